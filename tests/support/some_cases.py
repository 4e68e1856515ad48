"""Parameters of which `make test` runs a few, and `make test-all` all."""

from collections.abc import Iterable

import pytest


def some(names: Iterable[str], *quick: str) -> list[object]:
    """Return all names as parameters of a test, those that are not quick marked slow.

    Raises:
        ValueError: if one that is to be quick is no name.
    """
    names = list(names)
    if unknown := set(quick) - set(names):
        raise ValueError(f"{sorted(unknown)} are not among {names}")
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]
