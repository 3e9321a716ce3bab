"""Finds objects in images with a checkpoint, which alone rebuilds model, classes and settings:

python -m detr_fabric.predict runs/x/best.ckpt photo.jpg folder/
"""

from __future__ import annotations

import sys

from detr_fabric.cli import entry_point, parse
from detr_fabric.errors import UserError
from detr_fabric.predict.settings import ABOUT, PROG, Settings


@entry_point()
def main() -> None:
    settings = parse(Settings, sys.argv[1:], PROG, ABOUT)
    if not settings.paths:
        raise UserError(f"name images, or folders of images: {PROG} {settings.checkpoint} PATH ...")
    from detr_fabric.predict.files import predict

    predict(settings)


if __name__ == "__main__":
    main()
