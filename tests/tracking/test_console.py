"""The console never stops a run, whoever has left it."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import threading
from pathlib import Path

import pytest

from detr_fabric.tracking.console import Progress
from tests.terminals import written
from tests.tracking.nursery import Done, run_process


@pytest.mark.process
def test_a_run_ends_well_when_its_standard_output_is_a_broken_pipe(nursery: subprocess.Popen[str], home: Path) -> None:
    code = (
        "with Progress(1, 500) as progress:\n"
        "    for step in range(1, 501): progress.update(0, step, {'train/loss': 1.0}); progress.say('x' * 1000)\n"
        "    print('others print too', flush=True)\n"
        "Path('reached').touch()"
    )
    os.mkfifo(home / "pipe")

    def read_a_line() -> None:
        with (home / "pipe").open() as reader:
            reader.readline()

    reader = threading.Thread(target=read_a_line)
    reader.start()
    done = run_process(nursery, home, code, {1: str(home / "pipe")})
    reader.join()
    assert done == Done(0, "", "")
    assert (home / "reached").exists()


RECORD = {"train/loss": 3.25, "lr/transformer": 1e-4, "lr/backbone": 1e-5, "images_per_second": 12.0, "data_wait": 0.04}


def test_without_a_terminal_there_is_one_plain_line_a_record() -> None:
    stream = io.StringIO()
    with Progress(epochs=3, total_steps=90, stream=stream) as progress:
        for step in range(1, 21):
            progress.update(0, step, RECORD if step % 10 == 0 else None)
        progress.say("saved [bold]")
    first, second, third = stream.getvalue().splitlines()
    assert first.startswith("epoch 1/3 step 10/90 loss 3.250 lr 1.0e-04 12.0 images/s data 4% ETA 0:00:0")
    assert second.startswith("epoch 1/3 step 20/90")
    assert third == "saved [bold]"


def test_other_ranks_say_nothing() -> None:
    stream = io.StringIO()
    with Progress(epochs=1, total_steps=10, enabled=False, stream=stream) as progress:
        progress.update(0, 10, RECORD)
        progress.say("hello")
    assert stream.getvalue() == ""


def test_a_terminal_shows_a_bar_and_texts_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    master, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stream, Progress(epochs=3, total_steps=90, stream=stream) as progress:
        progress.update(1, 31, RECORD)
        progress.say("saved [bold]")
        progress.update(1, 32)
    shown = written(master)
    assert "epoch 2/3" in shown and "31/90 loss 3.250" in shown and "32/90 loss 3.250" in shown
    assert "saved [bold]\r\n" in shown


def test_training_goes_on_when_the_terminal_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    master, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stream, Progress(epochs=1, total_steps=10, stream=stream) as progress:
        progress.update(0, 1, RECORD)
        os.close(master)
        for step in range(2, 11):
            progress.update(0, step, RECORD)
            progress.say("still here")


def test_an_ascii_terminal_gets_escapes_instead_of_silence() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    progress = Progress(epochs=1, total_steps=1, stream=stream)
    progress.say("naïve")
    progress.say("plain")
    assert raw.getvalue() == b"na\\xefve\nplain\n"
