"""Trains a DETR: python -m detr_fabric.train [--preset NAME|FILE.py] [--section.field value …]; the loop: loop.py.

Exit codes: 0 done; 2 an error that the user can mend, said in one sentence; 75 asked to stop and saved, the same
command goes on; anything else is a crash.
"""

from __future__ import annotations

import sys

from detr_fabric.cli import fail, parse_train, reader_may_leave
from detr_fabric.config import Config
from detr_fabric.signals import EXIT_PREEMPTED, Preempted, Preemption


@reader_may_leave()
def main(preset: Config | None = None) -> None:
    """Parses the command line over a preset, then trains. torch is imported after that: --help is immediate."""
    config = parse_train(sys.argv[1:], preset)
    with Preemption() as preemption:  # setting up can take a minute
        train(config, preemption)


def train(config: Config, preemption: Preemption) -> None:
    """A run from start to exit code."""
    from detr_fabric.errors import EveryRankError, UserError
    from detr_fabric.launch import first_error_only, leave_together
    from detr_fabric.loop import fit, setup

    try:
        run = setup(config, preemption)
    except UserError as error:
        fail(error, everywhere=True)
    try:
        with first_error_only(run.fabric):
            fit(run)
        leave_together()
    except EveryRankError as error:
        if run.fabric.is_global_zero:
            print(f"error: {error}", file=sys.stderr, flush=True)
        leave_together()  # as it waits for all, the sentence is out before a launcher sees one rank end
        sys.exit(2)
    except UserError as error:
        fail(error)
    except Preempted:
        leave_together()
        # a launcher that sees one rank fail kills the others, and rank 0 may still be saving
        sys.exit(EXIT_PREEMPTED if run.fabric.is_global_zero else 0)


if __name__ == "__main__":
    main()
