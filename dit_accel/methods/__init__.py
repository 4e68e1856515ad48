"""The methods: one file each, found by the type of their config."""

from . import lite, radial
from .base import METHODS

__all__ = ["METHODS", "lite", "radial"]
