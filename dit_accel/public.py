"""The public names of `dit_accel`, loaded when they are requested from the modules that ``__init__.pyi`` names."""

import ast
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

_STUB = ast.parse(Path(__file__).with_name("__init__.pyi").read_text(encoding="utf-8"))

HOMES = {name.name: node.module for node in _STUB.body if isinstance(node, ast.ImportFrom) for name in node.names}
"""Name -> its module, below `dit_accel`."""


def public_name(name: str) -> Any:
    """Return what `dit_accel` gives by a public name; the package's ``__getattr__``.

    Raises:
        AttributeError: for another name.
    """
    if name == "__version__":
        return version("dit-accel")
    if name not in HOMES:
        raise AttributeError(f"module 'dit_accel' has no attribute {name!r}")
    return getattr(import_module(f"dit_accel.{HOMES[name]}"), name)
