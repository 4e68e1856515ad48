"""Gives dit-accel-assets the version of the other distributions, which stands in kernels/VERSION.

A source distribution does not hold that file; there the version is what its PKG-INFO says.
"""

from email import message_from_string
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
INFO, SHARED = HERE / "PKG-INFO", HERE.parent / "kernels" / "VERSION"

if INFO.exists():
    version = message_from_string(INFO.read_text(encoding="utf-8"))["Version"]
else:
    version = SHARED.read_text(encoding="utf-8").strip()
setup(version=version)
