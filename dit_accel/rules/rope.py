"""Frequencies of rotary positions, in radians per position, as pure functions."""

from collections.abc import Sequence

import numpy as np

from ..errors import ConfigError

KINDS = ("none",)
"""Kinds of frequencies: ``none`` is the model's own."""


def frequencies(kind: str, dim: int, theta: float, *, exponents: Sequence[float] | None = None) -> np.ndarray:
    """Return the frequencies of one axis, float64 [dim / 2]: theta^(-2 j / dim) for j = 0 .. dim / 2 - 1.

    Args:
        kind: one of `KINDS`.
        dim: channels that the axis rotates, two per frequency.
        theta: the base.
        exponents: e with theta^(-e) for each frequency, where a model has others than 2 j / dim.

    Raises:
        ConfigError: for an unknown kind, an odd or empty ``dim``, a base of 1 or less, exponents of another number.
    """
    if kind not in KINDS:
        raise ConfigError(f"rotary frequencies are of kind {' or '.join(KINDS)}, got kind={kind!r}; use one of them")
    if dim < 2 or dim % 2:
        raise ConfigError(f"rotary channels come in pairs, got dim={dim!r}; give an even number from 2 on")
    if not theta > 1:
        raise ConfigError(f"the base of rotary frequencies must be above 1, got theta={theta!r}; give the model's own")
    powers = np.arange(0, dim, 2, dtype=np.float64) / dim if exponents is None else np.asarray(exponents, np.float64)
    if powers.shape != (dim // 2,):
        raise ConfigError(f"dim={dim} has {dim // 2} frequencies, got {powers.size} exponents; give one for each")
    return theta**-powers
