"""What the attention of one or several checkpoints does, as numbers and pictures:

python -m detr_fabric.analysis runs/softmax/best.ckpt runs/sparsemax/best.ckpt --out attention --data.root coco
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from detr_fabric.analysis.settings import ABOUT, PROG, AnalysisSettings
from detr_fabric.cli import entry_point, parse
from detr_fabric.errors import UserError

if TYPE_CHECKING:
    from detr_fabric.runtime.rebuild import Rebuilt


@entry_point()
def main() -> None:
    rebuilt: dict[str, Rebuilt] = {}

    def start(given: AnalysisSettings) -> AnalysisSettings:
        from detr_fabric.runtime.rebuild import rebuild

        if not given.checkpoints:
            raise UserError(f"name a checkpoint: {PROG} CHECKPOINT")
        rebuilt.update({file: rebuild(Path(file), given.dc5) for file in given.checkpoints})
        return AnalysisSettings(given.checkpoints, rebuilt[given.checkpoints[0]].config.data)

    settings = parse(AnalysisSettings, sys.argv[1:], PROG, ABOUT, start)
    from detr_fabric.analysis.report import report

    report(rebuilt, settings)


if __name__ == "__main__":
    main()
