"""Every method and the main combinations, in settings that act on the tiny models of the context-parallel tests."""

from typing import Any

import dit_accel as d
from dit_accel.methods.base import AttentionHandler
from dit_accel.methods.config import MethodConfig
from dit_accel.methods.registry import handlers

LITE = dict(block_size=16, dense_steps=0, dense_layers=0)
ALWAYS = dict(LITE, dense_last_steps=0)
RADIAL = dict(decay_factor=0.2, near="half", sink=False, **ALWAYS)
SKIPS = dict(threshold=9.0, warmup_steps=1, max_consecutive=1)
SPARSED = d.SparseD(density=0.5, **ALWAYS)
VOTES = d.LiteAttention(threshold=-0.5, **LITE)

CASES: dict[str, tuple[MethodConfig, ...]] = {
    "lite": (VOTES,),
    "lite, target density": (d.LiteAttention(target_density=0.5, **LITE),),
    "lite, ranges": (d.LiteAttention(must_skip=(0, 32), **LITE),),
    "radial": (d.RadialAttention(**RADIAL),),
    "radial, pooled": (d.RadialAttention(rest="pooled", **RADIAL),),
    "lvsa": (d.LVSA(block_size=16, trained_frames=2, window=0),),
    "sparsed, mass": (d.SparseD(mass=0.7, **ALWAYS),),
    "sparsed, cached": (d.SparseD(density=0.5, rest="cached", refresh=2, **ALWAYS),),
    "sol": (d.SolAttention(beta=0.0, **ALWAYS),),
    "delta": (SPARSED, d.DeltaAttention(stride=8)),
    "dfa": (d.DFA(every=2, warmup_steps=1, last_steps=0),),
    "ultravico": (d.UltraViCo(trained_frames=2, alpha=0.5, beta=0.2, period=3, gamma=0.5, first_frame=True),),
    "ultraimage": (d.UltraImage(trained_height=2, trained_width=2, focus_max=2.0, rows=16),),
    "rope": (d.RoPE(kind="pi", trained_height=2, trained_width=2),),
    "softpag": (d.SoftPAG(heads=("L1H1", "L2H2-3"), scale=1.0),),
    "softpag, temperature": (d.SoftPAG(heads=("L1H1", "L2H2-3"), scale=1.0, target="temperature"),),
    "pag": (d.PAG(layers="L1", scale=1.0),),
    "softpag, uniform": (d.SoftPAG(heads=("L1H1", "L2H2-3"), scale=1.0, target="uniform"),),
    "seg": (d.SEG(layers="L1", sigma=1.0, scale=1.0),),
    "slg": (d.SLG(layers="L1", scale=1.0),),
    "slg, first block": (d.SLG(layers="L0", scale=1.0),),
    "autoguidance": (d.AutoGuidance(weak="a copy", scale=1.0),),
    "nag": (d.NAG(),),
    "cfgcache": (d.CFGCache(warmup_steps=1),),
    "easycache": (d.EasyCache(last_steps=0, **SKIPS),),
    "easycache, error": (d.EasyCache(error=1e9, warmup_steps=2, last_steps=0, max_consecutive=1, predictor="taylor"),),
    "teacache": (d.TeaCache(polynomial=(1.0, 0.0), **SKIPS),),
    "magcache": (d.MagCache(ratios=(1.0,) * 3, **SKIPS),),
    "seacache": (d.SeaCache(last_steps=0, **SKIPS),),
    "staticcache": (d.StaticCache(every=2, warmup_steps=1),),
    "progressive": (d.ProgressiveResolution(until=0.5, last_steps=0),),
    "firstblockcache": (d.FirstBlockCache(**SKIPS),),
    "dbcache": (d.DBCache(first_blocks=1, last_blocks=1, **SKIPS),),
    "dbprune": (d.DBPrune(threshold=0.5, warmup_steps=1, max_consecutive=1),),
    "profilingcache": (d.ProfilingCache(blocks="0-1", every=2, warmup_steps=1),),
    "delta + lite": (VOTES, d.DeltaAttention(stride=8, shrink=False)),  # a shrunk error of next to nothing is rounding
    "radial + lite + easycache": (d.RadialAttention(**RADIAL), VOTES, d.EasyCache(last_steps=0, **SKIPS)),
    "radial + ultravico + softpag": (
        d.RadialAttention(**RADIAL), d.UltraViCo(trained_frames=2, alpha=0.5), d.SoftPAG(heads="L1H2", scale=1.0),
    ),
    "lite + softpag + firstblockcache": (VOTES, d.SoftPAG(heads="L1H2", scale=1.0), d.FirstBlockCache(**SKIPS)),
    "sol + rope + nag + profilingcache": (
        d.SolAttention(beta=0.0, **ALWAYS), d.RoPE(kind="pi", trained_height=2, trained_width=2), d.NAG(),
        d.ProfilingCache(blocks="0-1", every=2, warmup_steps=1),
    ),
}  # fmt: skip

VIDEOS_ALONE = {"radial", "lvsa", "dfa", "ultravico"}
"""Methods that change nothing in an image, or refuse it."""

RING = {"radial", "lvsa", "ultravico", "softpag", "pag", "nag"}
"""Methods on attention that run under ring attention; so do all that do not act on attention."""

FEW = ("lite, target density", "lite, ranges", "delta", "ultraimage", "softpag", "firstblockcache")
"""What looks at heads, text, masks, tiles, positions and blocks."""


def ring_cases(image: bool) -> dict[str, tuple[Any, ...]]:
    """Return the cases of which ring attention takes every method."""
    known = handlers()
    refused = {name for name, handler in known.items() if issubclass(handler, AttentionHandler)} - RING
    return {
        name: methods for name, methods in cases_of(image).items() if not refused & {method.name for method in methods}
    }


def cases_of(image: bool) -> dict[str, tuple[Any, ...]]:
    """Return the cases that act on an image or on a video."""
    return {
        name: methods
        for name, methods in CASES.items()
        if not (image and VIDEOS_ALONE & {method.name for method in methods})
    }
