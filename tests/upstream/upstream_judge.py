"""Holds how foreign tests end in a mode against how they end plain, and against the differences we expect."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

MODES = ("neutral", "keep-all", "active")
NEEDED = {"neutral": "compared", "keep-all": "planned", "active": "planned"}
"""Mode -> the count that must not be 0: of forwards compared with a plain one, of attention calls planned."""


@dataclass(frozen=True)
class Expected:
    """A test that ends otherwise in a mode than plain, and why that is right."""

    mode: str  # one of `MODES`
    test: str  # its id, from the checkout's root
    outcome: str  # passed, skipped, xfailed, xpassed, failed or error
    reason: str


def read_expected(path: Path) -> list[Expected]:
    """Read the differences of a TOML file, a ``[[difference]]`` each; ValueError for one that is not as it must be."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    names = {field.name for field in fields(Expected)}
    if unknown := table.keys() - {"difference"}:
        raise ValueError(f"{path.name} has {', '.join(sorted(unknown))}; it holds [[difference]] entries alone")
    found: dict[tuple[str, str], Expected] = {}
    for entry in table.get("difference", []):
        empty = [name for name in names if not str(entry.get(name, "")).strip()]
        if entry.keys() != names or empty:
            raise ValueError(f"{path.name}: {entry} must have {', '.join(sorted(names))}, all of them filled in")
        one = Expected(**entry)
        if one.mode not in MODES:
            raise ValueError(f"{path.name}: no mode is called {one.mode!r}; known: {', '.join(MODES)}")
        if (one.mode, one.test) in found:
            raise ValueError(f"{path.name}: {one.test} is listed twice for {one.mode}; leave one entry")
        found[one.mode, one.test] = one
    return list(found.values())


def problems(
    mode: str, plain: Mapping[str, Any], attached: Mapping[str, Any], expected: Sequence[Expected], whole: bool
) -> list[str]:
    """Return what is wrong with a mode's run, from what `upstream_plugin.UpstreamPlugin` wrote down.

    If the run is `whole`, no tests were picked out, and every one of the `expected` differences must be there.
    """
    before, after = plain["tests"], attached["tests"]
    listed = {one.test: one for one in expected if one.mode == mode}
    found = [f"{test}: it ran in one of the two runs alone" for test in sorted(before.keys() ^ after.keys())]
    for test in (test for test in before if test in after):
        (was, _), (now, message) = before[test], after[test]
        right = listed[test].outcome if test in listed else was
        if now == right and (test not in listed or now != was):
            continue
        if test not in listed:
            found.append(f"{test}: {was} plain, {now} attached: {message}")
        elif now == was:
            found.append(f"{test}: is listed as {right} and ends as it does plain ({was}); take it out of the list")
        else:
            found.append(f"{test}: {was} plain, listed as {right}, {now} attached: {message}")
    if whole:
        gone = sorted(listed.keys() - before.keys())
        found += [f"{test}: is listed and there is no such test; take it out of the list" for test in gone]
    if not attached["counts"].get(NEEDED[mode]):
        found.append(f"nothing was {NEEDED[mode]}: the tests that were picked build no model that an adapter covers")
    return [f"{mode}: {text}" for text in found]
