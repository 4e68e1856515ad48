"""Small pieces of HTML for notebooks: they need nothing else, and take their colours from the page, light or dark."""

from collections.abc import Iterable, Sequence
from html import escape

_CELL = "text-align:left;padding:0 1em 0 0;vertical-align:top"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table of escaped values."""
    first = "".join(f'<th style="{_CELL}">{escape(name)}</th>' for name in head)
    cells = ("".join(f'<td style="{_CELL}">{escape(str(cell))}</td>' for cell in row) for row in rows)
    every = "".join(f"<tr>{row}</tr>" for row in ([first] if head else []) + [*cells])
    return f'<table style="border-collapse:collapse;background:none;font-size:inherit">{every}</table>'


def lines(texts: Iterable[str]) -> str:
    """Return a paragraph of escaped lines."""
    return f'<p style="margin:.3em 0">{"<br>".join(escape(text) for text in texts)}</p>'


def as_printed(text: str) -> str:
    """Return text as a terminal shows it, escaped, its columns kept."""
    return f'<pre style="background:none;color:inherit;margin:.3em 0">{escape(text)}</pre>'


def folded(title: str, inside: str) -> str:
    """Return HTML that a reader unfolds."""
    return f"<details><summary>{escape(title)}</summary>{inside}</details>"


def piece(title: str, *parts: str) -> str:
    """Return parts as one piece of HTML below a title."""
    return f"<div><b>{escape(title)}</b>{''.join(parts)}</div>"
