"""The defects that ``make mutants`` puts into the source."""

import ast
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "mutants"))
from mutants_run import score
from mutations import mutated, mutations_of

TEXT = '''"""A module of 3 lines."""

LIMIT = 4


def height(x: int = 2, names=()) -> int:
    """Return 1 of 2."""
    if x < LIMIT and not names:
        raise ValueError(f"{x + 1} is below {LIMIT}")
    warnings.warn("é", stacklevel=2)
    lines.append("é"); y = any(x == 1 for x in names)
    return max(x,
               3) - 1
'''
FOUND = """
3: 4 -> 5
6: 2 -> 3
8: x < LIMIT and not names -> x < LIMIT or not names
8: x < LIMIT -> x <= LIMIT
8: not names -> names
9: raise ValueError(f"{x + 1} is below {LIMIT}") -> pass
11: lines.append("é") -> pass
11: any(x == 1 for x in names) -> all((x == 1 for x in names))
11: x == 1 -> x != 1
11: 1 -> 2
12: max(x, 3) - 1 -> max(x, 3) + 1
12: max(x, 3) -> min(x, 3)
13: 3 -> 4
13: 1 -> 2
"""


def test_each_defect_is_where_it_says_and_nothing_else_changes():
    found = mutations_of("a.py", TEXT)
    assert [f"{one.line}: {one.before} -> {one.after}" for one in found] == FOUND.strip().splitlines()
    assert {one.where for one in found} == {"", "height"}
    assert len({one.key for one in found}) == len(found)  # the second 1 -> 2 has a number
    for one in found:
        text = mutated(TEXT, one)
        ast.parse(text)
        assert text != TEXT
        after = one.after if one.after == "pass" else f"({one.after})"
        assert " ".join(text.replace(after, one.before, 1).split()) == " ".join(TEXT.split())
    assert mutations_of("a.py", "@triton.jit\ndef kernel(x):\n    return x + 1\n") == []


@pytest.mark.parametrize(("ends", "share"), [("passed", 0.0), ("failed", 1.0), ("hung", 1.0)])
def test_equivalent_defects_do_not_count_and_survivors_are_named(ends, share):
    one, other, *_ = mutations_of("a.py", TEXT)
    outcomes = {one.key: {"end": ends, "tests": 3}, other.key: {"end": "passed", "tests": 2}}
    kept = score([one, other], outcomes, {other.key: "nobody reads it"})
    assert (kept["drawn"], kept["equivalent"], kept["share"]) == (2, 1, share)
    assert kept["survivors"] == ([{"line": 3, "defect": one.key, "tests": 3}] if ends == "passed" else [])
