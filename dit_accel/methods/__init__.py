"""The methods: one file each, found by the type of their config."""

from . import delta, frozen, lite, radial, sol, ultravico
from .base import METHODS

__all__ = ["METHODS", "delta", "frozen", "lite", "radial", "sol", "ultravico"]
