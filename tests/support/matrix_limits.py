"""What diffusers' own pipelines can't do, and what is refused on them, as it was found by running and reading them.

`python tests/support/matrix_limits.py [pattern]` writes tests/support/matrix_limits.json, from which the matrix knows
its cases without making a pipeline; a test finds all of it again.
"""

import json
import re
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from matrix_methods import METHODS
from matrix_refusals import declared
from matrix_situations import SITUATIONS, Plain, Trial, plain_of
from tiny_stock import PIPELINES

FILE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Limits:
    """What a pipeline takes no part in.

    Attributes:
        cannot: situation -> why the class can't be brought into it, whatever is attached.
        refused: methods that the adapter or diffusers declares to make no sense on it.
    """

    cannot: dict[str, str]
    refused: tuple[str, ...]


def _why_not(plain: Plain, situation: str) -> str | None:
    try:
        plain_of(situation, plain)
    except Exception as error:
        text = re.sub(r"\d+(\.\d+)?(e-?\d+)?", "N", " ".join(str(error).split()))
        return f"{type(error).__name__}: {text[:90]}"
    return None


def found_of(plain: Plain) -> Limits:
    """Run and read a pipeline."""
    plain.rows([0], [0])
    cannot = {one: why for one in SITUATIONS if (why := _why_not(plain, one)) is not None}
    return Limits(cannot, refused_of(plain))


def refused_of(plain: Plain) -> tuple[str, ...]:
    """Read which methods must be refused on a pipeline."""
    return tuple(method for method in METHODS if declared(Trial(plain, method)) is not None)


@cache
def limits() -> dict[str, Limits]:
    """Return pipeline -> its limits, as they were found last."""
    return {name: Limits(one["cannot"], tuple(one["refused"])) for name, one in json.loads(FILE.read_text()).items()}


def write(pattern: str) -> None:
    """Find the limits of the pipelines whose names hold a pattern, and write them down."""
    found = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name in PIPELINES:
        if re.search(pattern, name):
            found[name] = asdict(found_of(Plain(name)))
    lines = [f"{json.dumps(name)}: {json.dumps(found[name])}" for name in PIPELINES if name in found]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    write(sys.argv[1] if sys.argv[1:] else "")
