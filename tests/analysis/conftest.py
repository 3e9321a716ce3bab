"""The data that tests of the analysis share."""

from __future__ import annotations

import pytest

from detr_fabric.config import Config, DataConfig


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Config:
    data = DataConfig(shapes_train=2, shapes_val=10, shapes_dir=str(tmp_path_factory.mktemp("shapes")), workers=0)
    return Config(data=data).resolve()
