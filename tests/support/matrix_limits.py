"""What diffusers' own pipelines can't do, whatever is attached: found by running them plain.

`python tests/support/matrix_limits.py` writes tests/support/matrix_limits.json; a test runs them again.
"""

import json
import re
from pathlib import Path
from typing import Any

from matrix_situations import SITUATIONS, Plain, plain_of

FILE = Path(__file__).with_suffix(".json")


def limit_of(plain: Plain, situation: str) -> str | None:
    """Return why a plain pipeline can't be brought into a situation, or None."""
    try:
        plain_of(situation, plain)
    except Exception as error:
        text = re.sub(r"\d+(\.\d+)?(e-?\d+)?", "N", " ".join(str(error).split()))
        return f"{type(error).__name__}: {text[:90]}"
    return None


def limits() -> dict[str, dict[str, str]]:
    """Return pipeline -> situation -> why not, as it was found last."""
    return json.loads(FILE.read_text())


def write(stocks: dict[str, Any]) -> None:
    """Run every plain pipeline and write down what it can't do."""
    found: dict[str, dict[str, str]] = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name, stock in stocks.items():
        plain = Plain(name, stock)
        plain.rows([0], [0])
        found[name] = {one: why for one in SITUATIONS if (why := limit_of(plain, one)) is not None}
        FILE.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")


if __name__ == "__main__":
    import sys

    from matrix_stock import PIPELINES

    write({name: stock for name, stock in PIPELINES.items() if re.search(sys.argv[1] if sys.argv[1:] else "", name)})
