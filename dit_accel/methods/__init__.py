"""The methods: one file each, found by the type of their config."""

from .attention import delta, radial, sol, sparsed, ultravico
from .attention.lite import handler as lite
from .base import METHODS

__all__ = ["METHODS", "delta", "lite", "radial", "sol", "sparsed", "ultravico"]
