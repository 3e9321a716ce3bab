"""How training goes, on the console: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from detr_fabric.terminal import encodable, printable

Values = Mapping[str, float | int | str]


class Progress:
    """How training goes: a bar on a terminal, plain lines elsewhere. Silent once nobody reads it; never an error.

    total_steps: optimizer steps of the whole run; first_step: where it was resumed. enabled: rank 0.
    """

    def __init__(
        self, epochs: int, total_steps: int, first_step: int = 0, enabled: bool = True, stream: TextIO | None = None
    ) -> None:
        self._epochs, self._total, self._first = epochs, total_steps, first_step
        self._out = _Outlet(stream or sys.stdout, enabled)
        self._start = time.monotonic()
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        self._start = time.monotonic()
        if self._out.isatty():
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=16),
                TextColumn("{task.completed}/{task.total} {task.fields[numbers]}"),
                console=Console(file=self._out),  # type: ignore[arg-type]
                auto_refresh=False,  # no thread: workers are forked from this process
                redirect_stdout=False,
                redirect_stderr=sys.stderr.isatty(),
                transient=True,
            )
            self._task = self._bar.add_task("", total=self._total, completed=self._first, numbers="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self, epoch: int, step: int, values: Values | None = None) -> None:
        """After every step; epoch counts from 0, `values` are a record's, where one is written."""
        place = f"epoch {epoch + 1}/{self._epochs}"
        if self._bar is not None:
            self._bar.update(self._task, description=place, completed=step)
            if values is not None:
                self._bar.update(self._task, numbers=self._numbers(step, values))
            self._bar.refresh()
        elif values is not None:
            self.say(f"{place} step {step}/{self._total} {self._numbers(step, values)}")

    def say(self, text: str) -> None:
        """A line of text, above the bar; see terminal.say."""
        text = printable(text)
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._out.write(text + "\n")
            self._out.flush()

    def _numbers(self, step: int, values: Values) -> str:
        rates = [value for key, value in values.items() if key.startswith("lr/")]
        shown = {
            "loss {:.3f}": values.get("train/loss"),
            "lr {:.1e}": rates[0] if rates else None,
            "{:.1f} images/s": values.get("images_per_second"),
            "data {:.0%}": values.get("data_wait"),
            "skipped {}": values.get("skipped_images"),
        }
        seconds = (time.monotonic() - self._start) / max(step - self._first, 1) * (self._total - step)
        parts = [form.format(value) for form, value in shown.items() if value is not None]
        return " ".join([*parts, f"ETA {timedelta(seconds=round(seconds))}"])


class _Outlet:
    """A text stream that goes silent instead of raising when its terminal or pipe is closed."""

    def __init__(self, stream: TextIO, enabled: bool) -> None:
        self._stream, self._open = stream, enabled
        self.encoding = stream.encoding

    def isatty(self) -> bool:
        with self._silence():
            return self._open and self._stream.isatty()
        return False

    def write(self, text: str) -> int:
        if self._open:
            with self._silence():
                self._stream.write(encodable(text, self._stream))
        return len(text)

    def flush(self) -> None:
        if self._open:
            with self._silence():
                self._stream.flush()

    @contextlib.contextmanager
    def _silence(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # ValueError: the file object itself was closed
            self._open = False
            with contextlib.suppress(OSError, ValueError):  # so that Python's own flush at exit doesn't fail either
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
