"""Evaluates a checkpoint, which alone rebuilds model, classes and settings:

python -m detr_fabric.evaluate runs/x/best.ckpt --data.root coco --confusion 0.5 --worst 16
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from detr_fabric.cli import entry_point, fail, parse
from detr_fabric.errors import UserError
from detr_fabric.evaluate.settings import ABOUT, PROG, Settings, data_defaults

if TYPE_CHECKING:
    from detr_fabric.runtime.rebuild import Rebuilt


@entry_point()
def main() -> None:
    rebuilt: list[Rebuilt] = []

    def start(given: Settings) -> Settings:
        from detr_fabric.runtime.rebuild import rebuild

        rebuilt.append(rebuild(Path(given.checkpoint), given.dc5, given.weights))
        trained = rebuilt[0].config
        return Settings(given.checkpoint, data_defaults(trained.data, given.data), trained.eval)

    settings = parse(Settings, sys.argv[1:], PROG, ABOUT, start)
    from detr_fabric.evaluate.report import evaluate_checkpoint
    from detr_fabric.runtime.elastic import start_ranks
    from detr_fabric.runtime.launch import leave_together

    try:
        start_ranks(settings.devices)
        evaluate_checkpoint(rebuilt[0], settings)
        leave_together()
    except UserError as error:
        fail(error, everywhere=True)


if __name__ == "__main__":
    main()
