"""Checks a data set before it costs GPU time: what is wrong, what training does about it, what DETR sees.

python -m detr_fabric.check annotations.json --images folder
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from detr_fabric.check.settings import ABOUT, PROG, CheckSettings
from detr_fabric.cli import entry_point, parse
from detr_fabric.errors import UserError


@entry_point()
def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(CheckSettings, sys.argv[1:] if argv is None else argv, PROG, ABOUT)
    from detr_fabric.check.report import check

    try:
        accepted = check(settings)
    except MemoryError:
        raise UserError("the data set does not fit into memory: use fewer --workers or a larger machine") from None
    except RecursionError:
        raise UserError("the JSON is nested too deeply to work on: export it again") from None
    sys.exit(0 if accepted else 1)


if __name__ == "__main__":
    main()
