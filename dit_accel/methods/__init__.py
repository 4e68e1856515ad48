"""The methods: one file each, found by the type of their config."""

from . import radial, sol
from .base import METHODS

__all__ = ["METHODS", "radial", "sol"]
