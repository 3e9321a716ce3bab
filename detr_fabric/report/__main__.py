"""One HTML file that shows runs side by side: python -m detr_fabric.report runs/a runs/b [--out report.html]"""

from __future__ import annotations

import sys
from pathlib import Path

from detr_fabric.cli import entry_point, parse
from detr_fabric.errors import UserError
from detr_fabric.report.settings import ABOUT, PROG, Settings
from detr_fabric.terminal import say


@entry_point()
def main() -> None:
    settings = parse(Settings, sys.argv[1:], PROG, ABOUT)
    if not settings.runs:
        raise UserError(f"name a run: {PROG} RUN ...")
    from detr_fabric.report.write import report

    path = Path(settings.out)
    report(path, settings)
    say(f"{path}: {path.stat().st_size / 2**20:.1f} MB")


if __name__ == "__main__":
    main()
