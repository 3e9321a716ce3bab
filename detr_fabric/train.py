"""Trains a DETR: python -m detr_fabric.train [--preset NAME|FILE.py] [--section.field value …]; the loop: loop.py.

Exit codes: 0 done; 2 an error that the user can correct, said in one sentence; 75 asked to stop and saved, the same
command goes on; anything else is a crash.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from detr_fabric.cli import PREFIXLESS, entry_point, fail, parse
from detr_fabric.config import Config
from detr_fabric.errors import UserError
from detr_fabric.launcher import rank
from detr_fabric.presets import config_of_folder, flags, preset_files, starting_config
from detr_fabric.runtime.elastic import start_ranks
from detr_fabric.runtime.preemption import EXIT_PREEMPTED, Preempted, Preemption
from detr_fabric.terminal import say

PROG = "python -m detr_fabric.train"


@entry_point()
def main(preset: Config | None = None) -> None:
    """Parses the command line over a preset, then trains. torch is imported after that: --help is immediate."""
    config, remark = parse_command(sys.argv[1:], preset)
    start_ranks(config.train.devices)
    if remark is not None and rank() == 0:
        say(remark)
    with Preemption() as preemption:  # setting up can take a minute
        train(config, preemption)


def train(config: Config, preemption: Preemption) -> None:
    """A run from start to exit code."""
    from detr_fabric.build import setup
    from detr_fabric.errors import EveryRankError
    from detr_fabric.loop import fit
    from detr_fabric.report.write import report_after_training
    from detr_fabric.runtime.launch import first_error_only, leave_together

    try:
        run = setup(config, preemption)
    except UserError as error:
        fail(error, everywhere=True)
    try:
        with first_error_only(run.fabric, preemption):
            fit(run)
        if run.fabric.is_global_zero and config.train.report != "none":
            report_after_training(run.folder, config.train.report == "attention")
        leave_together()
    except EveryRankError as error:
        if run.fabric.is_global_zero:
            say(f"error: {error}", sys.stderr)
        leave_together()  # as it waits for all, the sentence is out before a launcher sees one rank end
        sys.exit(2)
    except UserError as error:
        fail(error)
    except Preempted:
        leave_together()
        # a launcher that sees one rank fail kills the others, and rank 0 may still be saving
        sys.exit(EXIT_PREEMPTED if run.fabric.is_global_zero else 0)


@dataclass(frozen=True)
class TrainArguments:
    """What a training starts from."""

    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME|FILE.py")] = None
    """Settings to start from, by name or from a file of your own that defines `config`. Any other flag changes them."""
    print_config: bool = False
    """Print the resulting settings as flags, and end."""
    config: Annotated[Config, PREFIXLESS] = field(default_factory=Config)


def parse_train(argv: Sequence[str], preset: Config | None = None) -> Config:
    """The resolved Config of `python -m detr_fabric.train argv`. Exits with 2 on bad input, 0 after --help."""
    return parse_command(argv, preset)[0]


def parse_command(argv: Sequence[str], preset: Config | None = None) -> tuple[Config, str | None]:
    """The resolved Config, and a sentence where its defaults are not the original recipe's although no preset says so.

    preset: settings that a preset started as a program begins with.
    """

    def start(given: TrainArguments) -> TrainArguments:
        started = preset if given.preset is None else None
        config = started or starting_config(given.preset, given.config)
        if given.preset is not None and config.train.name is None:
            config = replace(config, train=replace(config.train, name=Path(given.preset).stem))
        return TrainArguments(config=config)

    about = (
        f"Trains a DETR. The defaults are the original recipe's, unless a preset says otherwise: "
        f"{', '.join(sorted(preset_files()))}. Without --data.root it trains a small DETR on built-in scenes, with the "
        "defaults of quickstart. A switch takes --x, --no-x, --x True and --x False."
    )
    given = parse(TrainArguments, argv, PROG, about, start)
    try:
        config = given.config.resolve()
    except UserError as error:
        fail(error, everywhere=True)
    if given.print_config:
        lines = [PROG, *(f"    {shlex.join(flag)}" for flag in flags(config))]
        for line in lines[:-1]:
            say(f"{line} \\")
        say(lines[-1])
        sys.exit(0)
    named = preset or given.preset or config_of_folder(config.train)
    return config, scenes_sentence(config) if named is None and config.data.builtin else None


def scenes_sentence(config: Config) -> str:
    """What a training without data does, and what it would do with some."""
    return (
        f"no --data.root: trains a small {config.model.backbone} DETR on built-in scenes of {config.data.shapes_size} "
        f"pixels, with the defaults of --preset quickstart; with --data.root the same flags go over the original "
        f"recipe ({Config().train.epochs} epochs, {Config().model.last_stage}, {Config().model.enc_layers} + "
        f"{Config().model.dec_layers} layers)"
    )


if __name__ == "__main__":
    main()
