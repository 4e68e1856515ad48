"""Frequencies of rotary positions, in radians per position, as pure functions.

The period of a frequency f is 2 pi / f positions. Where a sequence is longer than trained, each kind lowers some or all
frequencies of an axis, s = length / trained times at most:

- ``none``: the model's own.
- ``pi``: all by s (position interpolation, arXiv 2306.15595).
- ``ntk``: base b becomes b s^(d / (d - 2)): the fastest stays, the slowest falls by s.
- ``yarn``: those that turn 32 times and more within the trained length stay, those that turn once or less fall by s, a
  ramp between (arXiv 2309.00071, without its temperature on the logits).
- ``riflex``: the one whose period is the trained length's turns ``turn`` times over the new length (arXiv 2502.15894).
- ``ultraimage``: the same for one after the other, until no period fits in twice (arXiv 2512.04504).
"""

from collections.abc import Sequence

import numpy as np

from ..errors import ConfigError, did_you_mean

KINDS = ("none", "pi", "ntk", "yarn", "riflex", "ultraimage")
"""Kinds of frequencies."""

BY_PERIOD = ("riflex", "ultraimage")
"""Kinds that change single frequencies, chosen by their period."""

NEAR = 0.9
"""The dominant frequency is the one of the smallest period that is at least this share of the trained length.

Ours; it finds every published one. The nearest period would miss HunyuanVideo's and CogVideoX's.
"""

TURN = {"riflex": 0.9, "ultraimage": 1.0}
"""Turns that a changed frequency makes over the new length: RIFLEx' released code; UltraImage's formula."""

RAMP = (1.0, 32.0)
"""Turns within the trained length between which YaRN's ramp lies."""


def frequencies(dim: int, theta: float, exponents: Sequence[float] | None = None) -> np.ndarray:
    """Return a model's own frequencies of one axis, float64 [dim / 2]: theta^(-2 j / dim).

    Args:
        dim: channels that the axis rotates, two per frequency.
        exponents: e with theta^(-e) for each frequency, where a model has others than 2 j / dim.
    """
    if dim < 2 or dim % 2:
        raise ConfigError(f"rotary channels come in pairs, got dim={dim!r}; give an even number from 2 on")
    if not theta > 1:
        raise ConfigError(f"the base of rotary frequencies must be above 1, got theta={theta!r}; give the model's own")
    powers = np.arange(0, dim, 2, dtype=np.float64) / dim if exponents is None else np.asarray(exponents, np.float64)
    if powers.shape != (dim // 2,):
        raise ConfigError(f"dim={dim} has {dim // 2} frequencies, got {powers.size} exponents; give one for each")
    return theta**-powers


def check_kind(
    kind: str, *, period: float | None = None, turn: float | None = None, indices: Sequence[int] | None = None
) -> None:
    """Check a kind and its options, whatever the frequencies."""
    if kind not in KINDS:
        raise ConfigError(f"rotary frequencies have no kind {kind!r}; {did_you_mean(str(kind), KINDS)}")
    for name, value, takes in (
        ("period", period, ("riflex",)),
        ("turn", turn, BY_PERIOD),
        ("indices", indices, ("ultraimage",)),
    ):
        if value is not None and kind not in takes:
            raise ConfigError(
                f"rotary frequencies of kind {kind!r} take no {name}, got {name}={value!r}; it is {' and '.join(takes)}"
                "'s"
            )
    if period is not None and not period > 0:
        raise ConfigError(f"period must be a number of positions above 0, got {period!r}; leave it out to find it")
    if turn is not None and not 0 < turn <= 1:
        raise ConfigError(f"turn must be above 0 and at most 1, got {turn!r}; RIFLEx' code has 0.9")
    if indices is not None and min(indices, default=-1) < 0:
        raise ConfigError(
            f"indices must be places among the frequencies, from 0 on, got {tuple(indices)!r}; leave them out to find "
            "them by their periods"
        )


def edited(
    kind: str,
    freqs: np.ndarray,
    *,
    trained: float,
    length: float,
    period: float | None = None,
    turn: float | None = None,
    indices: Sequence[int] | None = None,
) -> np.ndarray:
    """Return an axis's frequencies for a length, float64 of the shape of ``freqs``; ``freqs`` where it is no longer.

    Args:
        freqs: the model's frequencies, float64 [n], in any order; for ``pi`` and ``yarn`` of any shape and sign.
        period: of kind ``riflex``: change the frequency whose period is nearest to this; None: the `dominant` one.
        turn: of kinds ``riflex`` and ``ultraimage``: turns that a changed frequency makes over the length; None:
            `TURN`.
        indices: of kind ``ultraimage``: the frequencies that change, by place, fastest first; None: `corrections`.
    """
    check_kind(kind, period=period, turn=turn, indices=indices)
    freqs = np.asarray(freqs, np.float64)
    s = length / trained
    if kind == "none" or s <= 1:
        return freqs.copy()
    if kind == "pi":
        return freqs / s
    if kind == "yarn":
        turns = trained * np.abs(freqs) / (2 * np.pi)
        share = np.clip((turns - RAMP[0]) / (RAMP[1] - RAMP[0]), 0.0, 1.0)
        return share * freqs + (1 - share) * freqs / s
    if freqs.ndim != 1:
        raise ConfigError(
            f"rotary frequencies of kind {kind!r} are of one axis [n], got a shape of {freqs.shape}; use 'pi' or 'yarn'"
        )
    if kind == "ntk":
        fastest, slowest = freqs.max(), freqs.min()
        return freqs if fastest == slowest else freqs * s ** (-np.log(fastest / freqs) / np.log(fastest / slowest))
    if indices is not None:
        places = _by_rank(freqs, indices)
    elif kind == "ultraimage":
        places = corrections(freqs, trained, length)
    else:
        places = (dominant(freqs, trained) if period is None else int(np.abs(2 * np.pi / freqs - period).argmin()),)
    return _turning(freqs, places, length, TURN[kind] if turn is None else turn)


def _turning(freqs: np.ndarray, places: Sequence[int], length: float, turn: float) -> np.ndarray:
    """Slow the frequencies at some places to ``turn`` turns over a length; leave those below one turn."""
    new = freqs.copy()
    for place in places:
        if length > 2 * np.pi / freqs[place]:
            new[place] = min(freqs[place], turn * 2 * np.pi / length)
    return new


def dominant(freqs: np.ndarray, extent: float) -> int:
    """Return the place of the frequency that makes an extent repeat: of the smallest period of `NEAR` x it and more."""
    periods = 2 * np.pi / np.asarray(freqs, np.float64)
    fits = np.flatnonzero(periods >= NEAR * extent)
    if fits.size == 0:
        raise ConfigError(
            f"none of the axis's periods, {periods.min():.4g} to {periods.max():.4g} positions, is near the trained "
            f"{extent:g}; say which one repeats (period or indices), or use kind 'ntk'"
        )
    return int(fits[periods[fits].argmin()])


def corrections(freqs: np.ndarray, trained: float, length: float) -> tuple[int, ...]:
    """Return the places that UltraImage's recursion corrects, in its order: the dominant one, then those after it.

    The paper looks at a picture after each correction for the period that still repeats. Ours goes on to the next
    longer period while it fits twice into the length, which gives the published lists of FLUX.1 and Qwen-Image.
    """
    periods = 2 * np.pi / np.asarray(freqs, np.float64)
    order = np.argsort(periods, kind="stable")
    first = int(np.flatnonzero(order == dominant(freqs, trained))[0])
    later = [int(place) for place in order[first + 1 :] if 2 * periods[place] <= length]
    return int(order[first]), *later


def _by_rank(freqs: np.ndarray, indices: Sequence[int]) -> tuple[int, ...]:
    if max(indices) >= freqs.size:
        raise ConfigError(
            f"the axis has {freqs.size} frequencies, 0 to {freqs.size - 1}, got indices={tuple(indices)!r}; stay in "
            "that range"
        )
    order = np.argsort(-freqs, kind="stable")
    return tuple(int(order[index]) for index in indices)
