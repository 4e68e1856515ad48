"""Parameters of which `make test` runs a few, and `make test-all` all or some more."""

from collections.abc import Collection, Iterable

import pytest


def some(names: Iterable[str], *quick: str, slow: Collection[str] | None = None) -> list[object]:
    """Return all names as parameters of a test, those that are not quick marked slow, and rare if not among `slow`.

    Raises:
        ValueError: if one that is to be quick or slow is no name.
    """
    names = list(names)
    if unknown := {*quick, *(slow or ())} - set(names):
        raise ValueError(f"{sorted(unknown)} are not among {names}")
    rare = (pytest.mark.slow, pytest.mark.rare)
    return [
        pytest.param(name, marks=() if name in quick else pytest.mark.slow if slow is None or name in slow else rare)
        for name in names
    ]
