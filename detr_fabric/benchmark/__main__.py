"""Measures this machine: training's and evaluation's parts, ours beside a peer in the same run.

    python -m detr_fabric.benchmark [PART ...] [--json FILE] [--quick] [--data.root coco]

`ratio` is a row's time over ours, round by round: 2 means that ours is twice as fast; of attention, where much is ours,
it is over explicit softmax. torch is imported after the command line is read: --help is immediate.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detr_fabric.cli import fail, reader_may_leave
from detr_fabric.errors import UserError

PARTS = ("loss", "data", "eval", "inference", "step", "train", "attention", "start")


@reader_may_leave()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    try:
        record = run(args)
    except UserError as error:
        fail(error)
    if args.json is not None:
        try:
            args.json.write_text(json.dumps(record, indent=1) + "\n")
        except OSError as error:
            fail(UserError(f"--json {args.json}: {error.strerror}"))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m detr_fabric.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; none: all of them")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the figures there, with machine, versions and commit"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: does it run, not how fast")
    parser.add_argument(
        "--data.root",
        dest="root",
        type=Path,
        metavar="DIR",
        help="COCO folder whose training images `data` reads instead of images of its own",
    )
    parser.add_argument("--accelerator", choices=("auto", "cpu", "cuda"), default="auto", help="device type")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on the CPU; one is least noisy")
    args = parser.parse_args(argv)
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]!r}: choose from {', '.join(PARTS)}")
    if args.threads < 1:
        parser.error("--threads: 1 or more")
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures the parts one after the other and prints each table; returns the record that --json writes."""
    import torch

    from detr_fabric.benchmark import measure

    cuda = torch.cuda.is_available()
    if args.accelerator == "cuda" and not cuda:
        raise UserError("--accelerator cuda: no CUDA device is visible; use auto or cpu")
    device = torch.device("cuda" if cuda and args.accelerator != "cpu" else "cpu")
    torch.set_num_threads(args.threads)
    record: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": measure.commit(),
        "machine": measure.machine(device),
        "versions": measure.versions(),
        "quick": args.quick,
        "parts": {},
    }
    where = (
        record["machine"]["gpu"] or f"{record['machine']['cpu']}, {args.threads} of {record['machine']['cores']} cores"
    )
    print(f"{where}; torch {torch.__version__}; commit {record['commit']}")
    for name in args.parts or PARTS:
        part = importlib.import_module(f"detr_fabric.benchmark.{name}")
        of_data = (args.root,) if name == "data" else ()
        found = part.measure(device, args.quick, *of_data)
        record["parts"][name] = {"rows": found.rows, "missing": found.missing}
        print(f"\n{measure.table(name, found.rows)}")
        for package in found.missing:
            print(f"{package} is not installed: its rows are left out")
    return record


if __name__ == "__main__":
    main()
