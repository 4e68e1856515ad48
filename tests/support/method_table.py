"""The table of methods: one row a method or variant, with settings, bad options, companions and bytes held.

`tests/core/test_promises.py` runs every promise of `dit_accel.testing.promises` over it; a method's own test file holds
its rule alone. A bad option is a row of `each(option=values)`, or options that contradict each other and what the error
must say of them. What holds bytes holds them for a run of `tiny_wan()`: 224 tokens, 14 tiles of 16, 3 layers, 2 heads.
"""

from dataclasses import replace
from typing import Any

import diffusers
import torch
from diffusers import WanTransformer3DModel
from tiny_inputs import FLUX_LIKE, packed

import dit_accel as d
from dit_accel.testing.method_cases import CACHE_CASES, METHOD_CASES, MethodCase
from dit_accel.testing.tiny_models import TinyModel, tiny_wan

NAN, INF = float("nan"), float("inf")
SPARSE: dict[str, Any] = dict(block_size=16, dense_steps=0, dense_last_steps=0, dense_layers=0)
CACHE: dict[str, Any] = dict(warmup_steps=0, last_steps=0)
OUTPUT = 4 * 4 * 7 * 8 * 16
"""Bytes of one prediction, which is as large as the latents."""
BITS = 4 * 2 * 14
"""Bytes of the bits of a call's tiles: an int32 for each of 14 rows of tiles of 2 heads."""
TOKENS = 4 * 224 * 32
"""Bytes of what a call gives, 32 channels a token."""
CALLS = 2 * 3
"""Attention calls of a step: two prompts, three layers."""

RADIAL = METHOD_CASES["radial"].active
LITE = METHOD_CASES["lite"].active
SPARSED = METHOD_CASES["sparsed"].active


def each(**options: tuple[Any, ...]) -> tuple[tuple[Any, ...], ...]:
    """Return a bad row for each value of each option."""
    return tuple(({option: value},) for option, values in options.items() for value in values)


BAD_SPARSE = each(block_size=(100, 8, 1024, 128.0), dense_steps=(-1, 1.5), dense_last_steps=(-2,), dense_layers=(-3,))
BAD_CACHE = (
    *each(warmup_steps=(-1, 1.5), last_steps=(-2,), max_consecutive=(0,), reach=(0,), order=(0,)),
    *each(warmup_of=("all",)),
    ({"growing": True}, "max_consecutive, got None"),
    ({"predictor": "dmd"}, "hold", "taylor", "heun", "chebyshev"),
)
BAD_WINDOW = (*each(start=(-0.1,), stop=(1.5,)), ({"start": 0.5, "stop": 0.5}, "start = 0.5 to stop = 0.5"))
BAD_GUIDANCE = (
    *BAD_WINDOW, *each(scale=(-1.0,), rescale=(2.0,)), ({"mode": "free", "scale": 2.0}, "scale = 2.0", "mode = 'free'")
)  # fmt: skip


def _case(*bad: tuple[Any, ...], **settings: Any) -> MethodCase:
    """Return a case with bad rows."""
    return MethodCase(bad=bad, **settings)


def _row(name: str, *bad: tuple[Any, ...], **changes: Any) -> MethodCase:
    """Return a case that `check_adapter` tries as well, with what the table adds to it."""
    return replace((METHOD_CASES | CACHE_CASES)[name], bad=bad, **changes)


def _variant(name: str, **options: Any) -> MethodCase:
    """Return a case of other active settings of a method."""
    case = (METHOD_CASES | CACHE_CASES)[name]
    return replace(case, active=replace(case.active, **options))


def _guidance(active: Any, *bad: tuple[Any, ...], neutral: Any = None, **changes: Any) -> MethodCase:
    neutral = neutral or replace(active, scale=0.0)
    return MethodCase(neutral=neutral, active=active, bad=(*BAD_GUIDANCE, *bad), **changes)


class Weaker(WanTransformer3DModel):
    """A smaller model that computes in float64, whatever it is given."""

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """Return the prediction in the latents' dtype."""
        wide = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
        return tuple(x.to(inputs["hidden_states"].dtype) for x in super().forward(*args, **wide))


class FluxTransformer2DModel(diffusers.FluxTransformer2DModel):
    """An editing model that gives what its pipeline takes of the prediction: that of the first 80 tokens."""

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """Return the prediction for the picture that is made."""
        return tuple(x[:, :80] for x in super().forward(*args, **inputs))


EDITING = TinyModel(
    transformer=FluxTransformer2DModel, config=dict(FLUX_LIKE, pooled_projection_dim=8),
    inputs=lambda batch: packed(batch, references=True) | dict(pooled_projections=torch.randn(batch, 8)),
)  # fmt: skip
"""A tiny FLUX.1 Kontext, given a reference image of 6 tokens."""


def _weaker() -> Weaker:
    torch.manual_seed(7)
    return Weaker(**{**tiny_wan().config, "num_layers": 2}).double().eval()


TEXT = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(7))
WEAKER = _weaker()

TABLE: dict[str, MethodCase] = {
    "radial": _row(
        "radial", *BAD_SPARSE,
        *each(decay_factor=(0.0, -1, NAN, INF, "1"), near=("quarter",), sink=(1,), boundary=("all",)),
        *each(rest=(None,), order=("hilbert",)),
        ({"boundary": "published", "order": "tiles"}, "radial.order = 'tiles'", "boundary = 'any'"),
        beside=(LITE, d.SolAttention(**SPARSE), d.UltraViCo(trained_frames=2, alpha=0.5)), held=0,
    ),
    "radial, pooled rest": _variant("radial", rest="pooled"),
    "radial, tiles": _variant("radial", order="tiles"),
    "lite": _row(
        "lite", *BAD_SPARSE[:1],
        *each(threshold=(0.0, 3, NAN), criterion=("sum",), target_density=(1.0,), detect_every=(0,)),
        *each(rest=("drop",), refresh_every=(1,), must_keep=((1, 2, 3), (0, 9, 5, 12)), dense_steps=(-1,)),
        *each(must_skip=((5, 5), (-1, 5))), ({"criterion": "mass", "threshold": -10}, "(0, 1) for 'mass'"),
        ({"criterion": "budget", "threshold": 1.0}, "(0, 1) for 'budget'"),
        ({"target_density": 0.5, "threshold": -5}, "lite.threshold = -5", "lite.target_density = 0.5"),
        ({"thresholds_file": "a.toml", "threshold": -5}, "threshold = -5", "thresholds_file = 'a.toml'"),
        ({"criterion": "mass", "target_density": 0.5}, "'mass'"),
        ({"criterion": "budget", "thresholds_file": "a.toml"}, "'budget'"),
        ({"target_density": 0.5, "refresh": 3}, "lite.target_density = 0.5", "lite.refresh"),
        ({"refresh_every": 5, "rest": "cached"}, "lite.refresh_every = 5", "'cached'"),
        beside=(RADIAL, d.UltraViCo(trained_frames=2, alpha=0.5)), held=CALLS * BITS,
    ),
    "lite, by mass": _variant("lite", criterion="mass", threshold=0.2, allow_positive_threshold=False),
    "lite, by budget": replace(
        _variant("lite", criterion="budget", threshold=0.4, allow_positive_threshold=False), thins=False,
    ),
    "lite, pooled rest": _variant("lite", rest="pooled"),
    "lite, target density": _variant("lite", threshold=None, target_density=0.6, allow_positive_threshold=False),
    "lite, refreshed": _variant("lite", refresh_every=3),
    "sparsed": _row(
        "sparsed", *BAD_SPARSE, *each(density=(0.0, 1.5, NAN), mass=(1.0, 0), rest=("pool",), refresh=(1,)),
        ({"density": 0.3, "mass": 0.9}, "sparsed.density = 0.3", "sparsed.mass = 0.9"),
        ({"rest_dtype": "int8"}, "sparsed.rest_dtype = 'int8'", "'skip'"),
        ({"rest": "cached", "rest_dtype": "fp8"}, "'int4'", "'fp8'"), beside=(RADIAL, LITE, d.SolAttention(**SPARSE)),
        held=CALLS * BITS,
    ),
    "sparsed, by mass": _variant("sparsed", density=None, mass=0.7),
    "sparsed, pooled rest": _variant("sparsed", rest="pooled"),
    "sparsed, cached rest": replace(
        _variant("sparsed", rest="cached", refresh=3, rest_dtype="int4"), warm=1, everywhere=False, trains=False,
        held=CALLS * (2 * BITS + 2 * 224 * (8 + 4)),
    ),
    "delta": _row(
        "delta", *each(stride=(0, 2.0), reuse=(0,), margin=(-1, NAN), shrink=("no",), rotate=(2,), reactivate=(1,)),
        trains=False,
    ),
    "delta, reused": replace(METHOD_CASES["delta"], active=(d.DeltaAttention(stride=4, reuse=2), RADIAL), trains=False),
    "sol": _row(
        "sol", *BAD_SPARSE, *each(beta=(NAN, INF, "1"), beta_last=(-INF,), threshold=("full",), sink=("none",)),
        beside=(RADIAL, d.UltraViCo(trained_frames=2, alpha=0.5)), held=0,
    ),
    "sol, exact": _variant("sol", threshold="exact", beta_last=0.5),
    "lvsa": _row(
        "lvsa", *BAD_SPARSE[:1], *each(window=(-1,), first=(-2,), trained_frames=(0,), rest=("drop",), rotate=(1,)),
        beside=(LITE, RADIAL, SPARSED, d.UltraViCo(trained_frames=3, alpha=0.5, first_frame=True)), held=0,
    ),
    "lvsa, pooled rest": _variant("lvsa", rest="pooled"),
    "dfa": _case(
        *each(every=(0,), share=(1.5,), warmup_steps=(-1, 2.5), last_steps=(-1,)), neutral=d.DFA(every=1),
        active=d.DFA(share=0.25, every=2, **CACHE), warm=1, everywhere=False, held=CALLS * TOKENS,
    ),
    "ultravico": _row(
        "ultravico", *each(alpha=(1.1, 0.0), period=(1, INF), gamma=(-1,), trained_frames=(0, 2.5)),
        ({"period": 9, "beta": -0.5},), ({"alpha": 0.8, "beta": 0.9}, "alpha = 0.8"), held=0,
        beside=(
            RADIAL, replace(RADIAL, rest="pooled"), LITE, SPARSED, d.SolAttention(**SPARSE),
            d.RoPE(kind="ntk", trained_frames=3),
        ),
    ),
    "rope, ntk": MethodCase(
        neutral=d.RoPE(kind="none", trained_frames=2), active=d.RoPE(kind="ntk", trained_frames=2), thins=False,
    ),
    "ultravico, alpha alone": MethodCase(
        neutral=d.UltraViCo(trained_frames=2, alpha=1.0, first_frame=False),
        active=d.UltraViCo(trained_frames=2, alpha=0.9, center_keys=False), thins=False,
    ),
    "rope": _row(
        "rope", *each(kind=("rilfex",), axes=((), ("frames", "hieght"), ("text",)), factor=(0.5, 0.99), turn=(2.0,)),
        *each(trained_frames=(0,), trained_width=(1.5,)), ({"kind": "pi", "period": 3.0}, "'pi'", "period=3.0"),
        beside=(RADIAL,), held=0,
    ),
    "ultraimage": _row(
        "ultraimage",
        *each(focus_max=(0.9,), focus_min=(0.0,), power=(0.0,), rows=(0,), trained_width=(0,), turn=(1.5,)),
        *each(indices=((),)), ({"focus_min": 1.4, "focus_max": 1.2}, "focus_min = 1.4"), held=CALLS * 2 * 8,
    ),
    "staticcache": _row(
        "staticcache", *BAD_CACHE, *each(every=(0,), steps=((1, 2), (0, 1)), compute_at=((0.5, 11.0),)),
        ({"every": 2, "steps": (1, 0)}, "staticcache.every = 2"), held=2 * OUTPUT,
    ),
    "staticcache, taylor": replace(_variant("staticcache", predictor="taylor", every=2), held=2 * 2 * OUTPUT),
    "easycache": _row(
        "easycache", *BAD_CACHE, *each(threshold=(-0.1,), error=(0,)),
        ({"threshold": 0.1, "error": 0.2}, "easycache.threshold = 0.1"), held=(2 + 3) * OUTPUT + 2 * 4,
    ),
    "teacache": _row("teacache", *each(threshold=(-1.0,), polynomial=((),)), ({"polynomial_2": (1.0,)}, "is set"),
                     held=2 * OUTPUT + 4 * 32),
    "magcache": _row(
        "magcache", *each(threshold=(-0.1,), ratios=((0.9, 1.0), (), (1.0, -0.1))),
        ({"measured_on": "wan2.1-14b"}, "magcache.measured_on = 'wan2.1-14b'", "family"), held=2 * OUTPUT,
    ),
    "seacache": _row("seacache", *each(threshold=(-0.1,)), held=(2 + 1) * OUTPUT),
    "progressive": _case(
        *each(until=(1.5,), every=(0,), tau=(1,), last_steps=(1.5,)),
        neutral=d.ProgressiveResolution(until=1.0), active=d.ProgressiveResolution(until=0.0, last_steps=0),
        beside=(RADIAL, SPARSED), held=0,
    ),
    "progressive, every": _case(
        neutral=d.ProgressiveResolution(until=1.0, every=1), warm=1, beside=(RADIAL, LITE),
        active=d.ProgressiveResolution(until=1.0, every=3, last_steps=0), held=2 * (OUTPUT + OUTPUT // 4),
    ),
    "firstblockcache": _row("firstblockcache", *each(threshold=(-1.0,)), held=(2 + 1) * TOKENS),
    "dbcache": _case(
        *each(threshold=(-0.1,), first_blocks=(0,), last_blocks=(-1,)), held=(2 + 1) * TOKENS,
        neutral=d.DBCache(threshold=0.0, first_blocks=1, last_blocks=0, **CACHE),
        active=d.DBCache(threshold=1e9, first_blocks=1, last_blocks=0, **CACHE), warm=1, still_run=(0,),
    ),
    "dbprune": _case(
        *each(threshold=(-0.1,), first_blocks=(-1,)), neutral=d.DBPrune(threshold=0.0, **CACHE),
        active=d.DBPrune(threshold=1e9, first_blocks=0, **CACHE), warm=1, held=9 * TOKENS,
    ),
    "profilingcache": _case(
        *each(blocks=("one",)), ({"blocks": ()}, "0 blocks"), ({"blocks": "1", "every": 0},),
        ({"blocks": "1", "every": 2, "refresh": (3,)}, "every = 2", "refresh = (3,)"),
        ({"blocks": "1", "refresh": (3, 2)},), ({"blocks": "1", "refresh": ()},),
        ({"blocks": "1", "refresh": (3, 20), "measured_steps": 20}, "step 20"),
        ({"blocks": "1", "blocks_2": "2"}, "blocks_2 and profilingcache.refresh_2"),
        ({"blocks": "1-3", "refresh_2": (1,), "blocks_2": "3"}, "block 3"),
        ({"blocks": "a.json", "refresh_2": (1,), "blocks_2": "3"}, "a profile"),
        neutral=d.ProfilingCache(blocks="1", every=1, warmup_steps=0),
        active=d.ProfilingCache(blocks="1", every=2, **CACHE), warm=1, still_run=(0, 2), held=2 * TOKENS,
    ),
    "cfgcache": _case(
        *BAD_CACHE, *each(gate=(0, 1.5), stored=("residual",), branches=("all",)), held=2 * OUTPUT,
        neutral=d.CFGCache(warmup_steps=99), active=d.CFGCache(warmup_steps=1), warm=1, beside=(RADIAL, LITE, SPARSED),
    ),
    "referencecache": _case(  # on `EDITING`: 6 reference tokens, 4 layers
        *each(refresh_every=(0, 1.5), warmup_steps=(0,)), neutral=d.ReferenceCache(refresh_every=1),
        active=d.ReferenceCache(refresh_every=9), warm=1, held=2 * 4 * 2 * 4 * 6 * 32,
        beside=(d.SolAttention(**SPARSE),),
    ),
    "softpag": _guidance(
        d.SoftPAG(heads="L1H0", u=0.7, scale=2.0), *each(u=(1.5, -0.1), target=("zero",)),
        ({"rows": "image", "target": "temperature"}, "rows = 'image'"), beside=(RADIAL, LITE),
    ),
    "softpag, temperature": _guidance(
        d.SoftPAG(heads="L1", u=1.0, target="temperature", scale=2.0), neutral=d.SoftPAG(heads="L1", u=0.0),
    ),
    "softpag, uniform": _guidance(
        d.SoftPAG(heads="L1H1", u=0.5, target="uniform", scale=2.0), neutral=d.SoftPAG(heads=(), u=0.5),
    ),
    "softpag, mean query": _guidance(d.SoftPAG(heads="L0-1", u=1.0, target="mean-query", scale=2.0)),
    "pag": _guidance(d.PAG(layers="L1", scale=2.0)),
    "seg": _guidance(d.SEG(layers="L1", sigma=1.0, scale=2.0), *each(sigma=(0.0,))),
    "slg": _guidance(d.SLG(layers="L1", scale=2.0, start=0.0, stop=1.0), neutral=d.SLG(layers="", scale=1.0)),
    "autoguidance": _guidance(
        d.AutoGuidance(weak_transformer=WEAKER, scale=2.0), ({"mode": "free"},),
        ({"weak": "a", "weak_transformer": WEAKER}, "got both"),
    ),
    "nag, at its bounds": MethodCase(
        neutral=d.NAG(alpha=0.0, negative_embeds=TEXT), active=d.NAG(scale=11.0, alpha=1.0, negative_embeds=TEXT),
    ),
    "nag": _case(
        *BAD_WINDOW, *each(scale=(0.5,), tau=(0.5,), alpha=(1.5,), negative_prompt=(3,)),
        ({"negative_prompt": "a", "negative_embeds": TEXT}, "negative_prompt", "both"),
        ({"negative_embeds": TEXT[0]}, "[1, tokens, C]", "got [9, 16]"),
        ({"negative_embeds": TEXT[:, :0]}, "[1, tokens, C]", "got [1, 0, 16]"),
        neutral=d.NAG(scale=1.0, negative_embeds=TEXT), active=d.NAG(scale=4.0, alpha=0.5, negative_embeds=TEXT),
    ),
}  # fmt: skip
"""Name of a row, a method's or a variant's -> its case; a row a method of this repository."""
