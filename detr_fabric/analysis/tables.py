"""Tables for papers: mean ± standard deviation as aligned text, CSV, Markdown and LaTeX. Standard library only."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

MISSING = "–"
LATEX = {**{sign: "\\" + sign for sign in "_%&#"}, "±": r"$\pm$", MISSING: "--"}


class Value(NamedTuple):
    """What a cell shows."""

    mean: float
    deviation: float | None  # None: of a single value there is none


def summarize(values: Sequence[float]) -> Value | None:
    """Mean and sample standard deviation; None without values."""
    return Value(fmean(values), stdev(values) if len(values) > 1 else None) if values else None


class Table(NamedTuple):
    """Columns of text, then columns of values."""

    labels: tuple[str, ...]  # headers of the columns of text
    measures: dict[str, int]  # headers of the columns of values, and their decimals
    rows: list[tuple[list[str], list[Value | None]]]

    def lines(self) -> list[list[str]]:
        """The header and the rows as people read them, without the columns that have no value."""
        shown = [n for n in range(len(self.measures)) if any(values[n] is not None for _, values in self.rows)]
        names, places = list(self.measures), list(self.measures.values())

        def entry(value: Value | None, decimals: int) -> str:
            parts = [f"{part:.{decimals}f}" for part in value or () if part is not None]
            return " ± ".join(parts) or MISSING

        header = [*self.labels, *(names[n] for n in shown)]
        return [header, *([*labels, *(entry(values[n], places[n]) for n in shown)] for labels, values in self.rows)]

    def text(self) -> str:
        """Aligned columns."""
        lines = self.lines()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)

    def markdown(self) -> str:
        header, *lines = (f"| {' | '.join(line)} |" for line in self.lines())
        return "\n".join([header, "|---" * len(self.lines()[0]) + "|", *lines, ""])

    def latex(self) -> str:
        """A tabular that needs no package."""
        escaped = [["".join(LATEX.get(sign, sign) for sign in cell) for cell in line] for line in self.lines()]
        header, *lines = (" & ".join(line) + r" \\" for line in escaped)
        columns = "l" * len(self.labels) + "c" * (len(escaped[0]) - len(self.labels))
        return "\n".join([rf"\begin{{tabular}}{{{columns}}}", header, r"\hline", *lines, r"\end{tabular}", ""])

    def write(self, folder: Path, name: str) -> None:
        """NAME.csv, with all digits and a column for each mean and deviation, NAME.md and NAME.tex. Raises OSError."""
        header = [*self.labels, *(f"{measure} {part}" for measure in self.measures for part in ("mean", "std"))]
        rows = [[*labels, *(part for value in values for part in value or ("", ""))] for labels, values in self.rows]
        write_csv(folder / f"{name}.csv", header, rows)
        (folder / f"{name}.md").write_text(self.markdown())
        (folder / f"{name}.tex").write_text(self.latex())


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """None and "" become empty cells. Raises OSError."""
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
