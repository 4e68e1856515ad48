"""The API pages of the documentation name every public name once, where it is defined."""

import importlib
import re
from pathlib import Path

import pytest

API = Path(__file__).parents[2] / "docs" / "api"
ENTRIES = [
    entry for page in sorted(API.glob("*.md")) for entry in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.M)
]
PACKAGES = (
    "dit_accel", "dit_accel.methods", "dit_accel.adapters", "dit_accel.testing", "dit_accel_kernels",
    "dit_accel_eval.metrics",
)  # fmt: skip


def found(entry: str):
    module, _, name = entry.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_an_entry(package):
    module = importlib.import_module(package)
    known = [found(entry) for entry in ENTRIES]
    for name in set(module.__all__) - {"__version__"}:
        value = getattr(module, name)
        assert any(one is value for one in known), f"{package}.{name} is on no page of docs/api"


def test_no_name_stands_twice():
    assert len(ENTRIES) == len(set(ENTRIES))
