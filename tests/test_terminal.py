"""What is printed: names from strangers can't control the terminal, and no encoding loses or stops anything."""

from __future__ import annotations

import io
import os
import pty
import sys

import pytest

from detr_fabric.terminal import counted, decimal, say
from tests.terminals import written


@pytest.mark.parametrize(
    "text, line",
    [
        ("\x1b[2J\x1b]0;pwned\x07", r"\x1b[2J\x1b]0;pwned\x07"),
        ("4\x1b[31m\nX.jpg", r"4\x1b[31m\nX.jpg"),
        ("a\rb\tc\x9bd", r"a\rb\tc\x9bd"),
        ("\u202egpj.exe", r"\u202egpj.exe"),
        ("caf\udce9.png", r"caf\udce9.png"),
        ("großer Hund, 犬, می\u200cخواهم", "großer Hund, 犬, می\u200cخواهم"),
    ],
)
def test_control_characters_are_escapes_and_letters_are_not(
    text: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    say(text)
    assert capsys.readouterr().out == f"{line}\n"


@pytest.mark.parametrize(
    "encoding, line",
    [("ascii", rb"Stra\xdfe \u2265 0.5"), ("iso-8859-1", b"Stra\xdfe \\u2265 0.5"), ("utf-8", "Straße ≥ 0.5".encode())],
)
def test_what_an_encoding_lacks_is_an_escape(encoding: str, line: bytes) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    say("Straße ≥ 0.5", stream)
    assert raw.getvalue() == line + b"\n"


def test_a_count_is_silent_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with counted("images", 2) as done:
        done(1)
        done(2)
    assert capsys.readouterr() == ("", "")


def test_a_count_is_one_line_of_a_terminal_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    master, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        with counted("images", 2) as done:
            done(1)
            done(2)
    shown = written(master)
    assert "images" in shown and "2/2" in shown and shown.endswith("\x1b[2K")  # the line is erased


def test_an_undefined_score_is_a_dash() -> None:
    assert [decimal(-1.0), decimal(0.0), decimal(0.12345, 4)] == ["–", "0.000", "0.1235"]
