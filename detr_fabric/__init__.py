"""DETR on Lightning Fabric. From Python: `from detr_fabric import load`; torch is imported when that is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from detr_fabric.launcher import forget_empty

if TYPE_CHECKING:
    from detr_fabric.predict.detector import load as load

__all__ = ["load"]

forget_empty()  # before anything imports Fabric, which fails on them


def __getattr__(name: str) -> Any:
    if name == "load":
        from detr_fabric.predict.detector import load

        return load
    raise AttributeError(f"module 'detr_fabric' has no attribute {name!r}")
