"""The page: one HTML file that holds its data, its scripts and its styles, and asks the network for nothing.

Text of data sets and runs reaches the page as JSON only, in a script element that can't be closed from inside, and the
scripts write it as text, never as HTML.
"""

from __future__ import annotations

import json
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from detr_fabric.runtime.files import replace_text, writing

UPLOT = ("uPlot.LICENSE", "uPlot.min.css", "uPlot.iife.min.js")
OURS = ("page.css", "curves.js", "page.js", "maps.js", "classes.js", "views.js", "explorer.js")


def write_page(path: Path, content: dict[str, Any]) -> None:
    """Writes the page of collect()'s data, replacing an earlier file whole. Raises UserError where it can't."""
    with writing(str(path), "choose another file with --out"):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, page(content))


def page(content: dict[str, Any]) -> str:
    """The whole HTML."""
    made = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
    text = read("page.html")
    for part in UPLOT + OURS:
        text = text.replace(f"/*{part}*/", read(part))
    return text.replace("/*data*/", embedded({"made": made, **content}))


def read(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def embedded(content: Any) -> str:
    """JSON that stays inside its script element, whatever it says."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)  # ASCII alone: others are escaped
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
