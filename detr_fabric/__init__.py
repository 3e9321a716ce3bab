"""DETR on Lightning Fabric. From Python: `from detr_fabric import load`; torch is imported when that is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detr_fabric.detector import load as load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from detr_fabric.detector import load

        return load
    raise AttributeError(f"module 'detr_fabric' has no attribute {name!r}")
