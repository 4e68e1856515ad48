"""The methods: one file each, found by the type of their config."""

from . import delta, frozen, radial
from .base import METHODS

__all__ = ["METHODS", "delta", "frozen", "radial"]
