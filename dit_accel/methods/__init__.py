"""The methods: one file each, found by the type of their config."""

from . import delta, radial
from .base import METHODS

__all__ = ["METHODS", "delta", "radial"]
