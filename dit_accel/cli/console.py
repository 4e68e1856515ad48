"""Where the command line writes: data to stdout, talk to stderr."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..files import json_text

OUT = Console(highlight=False, soft_wrap=False)
"""Tables and other data that a user requested."""

TALK = Console(stderr=True, highlight=False)
"""Notes, warnings, progress and errors."""


def print_json(data: Any) -> None:
    """Print ``data`` as JSON on stdout, never wrapped or coloured; see `json_text`."""
    print(json_text(data))


def flush() -> None:
    """Write out what stdout still holds; if it can't be, drop it, so that Python's end does not fail by it again.

    Raises:
        SystemExit: with code 1 where the reader has gone, as after ``| head``.
        OSError: for what else keeps it from being written, such as a full disk.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            raise SystemExit(1) from None
        raise


def note(text: str) -> None:
    """Say something that the user may want to know but need not act on."""
    TALK.print(Text("note: ", style="bold cyan") + Text(text), soft_wrap=True)


def warn(text: str) -> None:
    """Say something that the user probably wants to change."""
    TALK.print(Text("warning: ", style="bold yellow") + Text(text), soft_wrap=True)


def print_error(text: str) -> None:
    """Print one line: what was requested, what was found, what to do."""
    TALK.print(Text("error: ", style="bold red") + Text(" ".join(text.split())), soft_wrap=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Print rows under columns on stdout; see `plain_table`."""
    table = plain_table(*columns, right=tuple(right))
    for row in rows:
        table.add_row(*row)
    OUT.print(table)


def plain_table(*columns: str, right: tuple[str, ...] = (), title: str | None = None) -> Table:
    """Return an empty table in the project's style; the columns named in ``right`` are right-aligned."""
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table
