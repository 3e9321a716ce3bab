"""Runs reported cases again: python tests/cases.py FOLDER [KIND/NAME ...], where FOLDER has data/, train/ and faults/
with a folder for each case.

Prints a line for each: held, NOT HELD or not re-run, with the reason; exit code 1 if one did not hold. What must be
seen of each is in tests/reported/.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detr_fabric.errors import UserError  # noqa: E402
from tests.reported import data, faults, train  # noqa: E402
from tests.reported.runs import NotRun  # noqa: E402

CASES: dict[str, dict[str, Callable[[Path], object]]] = {
    "data": data.CASES,
    "train": train.CASES,
    "faults": faults.CASES,
}


def rerun(case: Callable[[Path], object], at: Path) -> tuple[str, str]:
    """How a case ends in its folder, and why."""
    try:
        return ("NOT HELD", "") if case(at) is False else ("held", "")
    except NotRun as reason:
        return "not re-run", str(reason)
    except (UserError, AssertionError) as error:
        return "NOT HELD", (str(error).splitlines() or ["an assertion"])[0]
    except Exception as error:
        return "NOT HELD", f"{type(error).__name__}: {error}".splitlines()[0]


def restore_links(folder: Path) -> None:
    """Links that were copied as files which hold their target become links again."""
    for file in folder.rglob("*"):
        if (
            file.is_file()
            and not file.suffix
            and file.stat().st_size < 100
            and (target := file.read_text()).startswith("../")
        ):
            file.unlink()
            os.symlink(target, file)


def main() -> None:
    source, only = Path(sys.argv[1] if len(sys.argv) > 1 else "missing"), sys.argv[2:]
    if not (source / "data").is_dir():
        sys.exit(f"{source} is no folder of cases: python tests/cases.py FOLDER, which has data/, train/ and faults/")
    count = Counter[str]()
    with tempfile.TemporaryDirectory() as place:
        for kind, cases in CASES.items():
            copy = Path(place).resolve() / kind
            shutil.copytree(source / kind, copy, symlinks=True)
            for folder in [copy, *copy.rglob("*")]:
                if folder.is_dir():
                    folder.chmod(0o755)
            restore_links(copy)
            for folder in sorted(folder for folder in copy.iterdir() if (folder / "case.md").is_file()):
                name = f"{kind}/{folder.name}"
                if only and name not in only:
                    continue
                began = time.monotonic()
                case = cases.get(folder.name)
                # cases of data are read where they lie; runs share a folder, and with it the run they start from
                result, why = (
                    ("not re-run", "no script") if case is None else rerun(case, copy if kind != "data" else folder)
                )
                count[result] += 1
                seconds = f" ({time.monotonic() - began:.0f} s)"
                print(f"{result:10} {name}{seconds}{why and ': '}{why}", flush=True)
    print(", ".join(f"{number} {result}" for result, number in count.items()))
    sys.exit(1 if count["NOT HELD"] else 0)


if __name__ == "__main__":
    main()
