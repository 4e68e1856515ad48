"""Predict, by arithmetic alone, what a run costs and what methods save: tokens, FLOPs, memory and speed-up.

A product of two n x n matrices counts 2 n^3 FLOPs. Counted per transformer forward: the four projections of the
self-attention, its Q K^T and P V, the query and output projections of the cross-attention with its Q K^T and P V, and
the two matrices of the feed-forward. Not counted: embeddings, norms, modulation, text encoder, autoencoder, sampler;
together a few percent at most. What a method saves it declares itself, by `Handler.estimate`; what a cache saves that
decides by the data is counted for presets alone, whose share of skipped forwards was measured.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from ..adapters.adapter import Adapter, Family
from ..adapters.rotary import check_lengths
from ..errors import ConfigError
from ..methods.base import Handler, Model
from ..methods.caches.cache_config import StepCacheConfig
from ..methods.compose import make_handlers
from ..methods.config import MethodConfig
from ..methods.presets import PresetMethods
from ..methods.saving import Saving
from ..plan.layout import TokenLayout
from ..report.html import lines, piece, table
from ..report.report import PredictedSpeedup
from .hardware import LINEAR_COST, Hardware, Linears, linears_called, linears_of, linears_of_config, weights_of
from .kept_races import elsewhere, measured_cost
from .sizes import beyond_trained, check_steps, rounded_frames, token_layout
from .work import (
    ASSUMED_BYTES,
    TilesLeft,
    attention_flops,
    linear_flops,
    other_flops,
    tiles_a_side,
    tiles_left,
)

KERNEL_COST = 1.15
"""Time of a sparse kernel per kept FLOP over that of the dense kernel, measured at 1.05 to 1.65 on GPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a run costs and what the methods save. FLOPs are of the whole run: all steps, forwards and layers."""

    family: Family  # the model's sizes
    layout: TokenLayout  # the token layout
    height: int  # output height in pixels
    width: int  # output width in pixels
    num_frames: int  # output frames, rounded as the pipeline does
    num_inference_steps: int  # denoising steps
    methods: Mapping[str, Mapping[str, Any]]  # method name -> its options on this model
    savings: Mapping[str, Saving]  # method name -> what it declares, with the measured skips of a preset's cache
    tiles: TilesLeft | None  # what the methods together leave of the attention's tiles; None where none thins it out
    kernel_cost: float  # time per kept FLOP of the sparse kernel over the dense one's
    cost_measured: str  # where that was measured on this machine, in words; empty: it was not
    linears: Linears | None  # how the linear layers compute; None: in 16 bits, as all else does
    forwards: int  # transformer forwards of the dense run, one per batch row
    attention_flops: int  # Q K^T and P V of all self-attention, dense
    total_flops: int  # everything that is counted, dense
    planned_attention_flops: int  # Q K^T and P V with the methods attached, dense steps and layers included
    planned_total_flops: int  # everything that is counted, with the methods attached
    times_trained: float  # FLOPs of the dense run over one of the trained size; 1 where it is no larger, or not known
    # self-attention's share of the dense run's FLOPs, a, which stands in for its share of the time
    attention_share: float
    linear_share: float  # the linear layers' share of the dense run's FLOPs, b
    linear_time: float  # time of the linear layers over that in 16 bits, lambda
    dense_share: float  # share of the computed attention calls that stay dense, w
    # share of the query-key pairs that a planned call computes, text and probe rows included, rho; a pooled tile is one
    # key
    pair_density: float
    # kappa, time per kept FLOP over the dense kernel's: 1 where whole rows are left out, and the kernel is dense
    cost_of_pairs: float
    # computed forwards over the dense run's; extra forwards count, and skipped blocks as parts of one
    forward_share: float
    computed_blocks: float  # share of the dense run's blocks that are computed; those of extra forwards are not counted
    # what the speed-up is the product of: computed ``forwards``, sparse ``attention``, then ``linears``
    factors: Mapping[str, float]
    speedup: float  # of the denoising loop over the dense one in 16 bits
    # the same over the dense loop of the same model, whose linear layers compute as they do here
    speedup_of_methods: float
    equal_steps: float  # steps of a dense run that takes as long as the planned one
    weight_bytes: int  # least memory of the transformer's weights: the matrices that every block has
    tile_list_bytes: int  # int32 tile lists and bitmaps on the device, shared by all layers, heads and steps
    pooled_bytes: int  # means of K and sums of V of one attention call, where tiles are pooled; bf16, one batch row
    # method name -> what it holds from step to step, one batch row, all branches and experts
    carried_bytes: Mapping[str, int]
    state_bytes: int  # memory that the methods hold besides the model
    # methods that save what is known only while they run, so that nothing of theirs is counted
    uncounted_methods: tuple[str, ...]
    notes: tuple[str, ...]  # what a user should know about the prediction
    warnings: tuple[str, ...]  # what a user should know about the methods on this layout

    def least_seconds(self, card: Hardware) -> float | None:
        """Return the least seconds that the dense run's products take on a card; None where its speed is not known."""
        if card.tflops is None:
            return None
        others = self.total_flops * (1 - self.attention_share - self.linear_share * (1 - self.linear_time))
        return (others + self.attention_flops / card.attention) / (card.tflops * 1e12)

    def _repr_html_(self) -> str:
        size = f"{self.width} x {self.height} pixels, {self.num_frames} frames, {self.num_inference_steps} steps"
        rows = [("dense", f"{self.attention_flops:.3g}", f"{self.total_flops:.3g}", "1")]
        if self.methods or self.linears:
            planned = f"{self.planned_attention_flops:.3g}", f"{self.planned_total_flops:.3g}"
            layers = [f"linear layers {self.linears}"] if self.linears else []
            rows.append((" + ".join([*self.methods, *layers]), *planned, f"{self.speedup:.2f}"))
        head = ("", "FLOPs of attention", "FLOPs in all", "predicted speed-up")
        return piece(f"{self.family.name}: {size}", table(head, rows), lines([*self.warnings, *self.notes]))

    def to_dict(self) -> dict[str, Any]:
        """Return the prediction as plain numbers, for JSON; sizes in pixels, tokens, FLOPs and bytes."""
        whole, tiles, layout = tiles_a_side(self.layout) ** 2, self.tiles, self.layout
        left_out = ("layout", "savings", "tiles", "pair_density", "cost_of_pairs", "speedup", "notes", "warnings")
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in left_out}
        return {
            **values,
            "family": self.family.name,
            "repo": self.family.repo,
            "frames": layout.frames,
            "tokens_per_frame": layout.tokens_per_frame,
            "tokens": layout.visual_tokens,
            "text_tokens": layout.tokens - layout.visual_tokens,
            "tiles_total": tiles.total if tiles else whole,
            "tiles_kept": tiles.kept if tiles else whole,
            "density": tiles.density if tiles else 1.0,
            "linears": self.linears and self.linears.kind,
            "predicted_speedup": self.speedup,
            "methods": {name: dict(options) for name, options in self.methods.items()},
            "uncounted_methods": list(self.uncounted_methods),
        }


def estimate(
    adapter: Adapter,
    family: Family,
    *,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    num_inference_steps: int | None = None,
    methods: Sequence[MethodConfig] = (),
    preset: PresetMethods | None = None,
    kernel_cost: float | None = None,
    config: Mapping[str, Any] | None = None,
    linears: str | Linears | None = None,
    hardware: str | None = None,
    linear_cost: float = LINEAR_COST,
) -> Prediction:
    """Predict a run of a model with methods attached; what is left out takes the family's default.

    Sizes are those of `Prediction`. The transformer's ``config`` tells how long its tables of positions are, and
    whether its weights are torchao's in 8 bits; None: the family's.

    Args:
        preset: further methods, of which a cache's measured skips are counted.
        kernel_cost: time of a sparse kernel per kept FLOP over the dense kernel's; None: what was measured on this
            machine, if ``hardware`` names no other, else `KERNEL_COST`.
        linears: how the linear layers compute: ``int8`` or ``fp8``, weights and activations, ``weight-only``, or
            another of `QUANTIZATIONS`; None: as the config says, else in 16 bits.
        hardware: the card whose figures count for them, as `find_hardware` knows it; None: an H100.
        linear_cost: time of an 8-bit product per FLOP over what the card's data sheet gives.

    Raises:
        ConfigError: for sizes the model can't make or has no positions for, methods it can't take or that can't be
            attached together, or linear layers for which the card has no unit.
    """
    height, width = height or family.height, width or family.width
    steps = family.num_inference_steps if num_inference_steps is None else num_inference_steps
    check_steps(steps)
    if kernel_cost is not None and not 0 < kernel_cost < 1000:
        raise ConfigError(
            f"kernel_cost must be above 0 and below 1000, got {kernel_cost}; 1 is as efficient as the dense kernel"
        )
    frames = rounded_frames(family, family.num_frames if num_frames is None else num_frames)
    layout = token_layout(family, height=height, width=width, num_frames=frames)
    config = family.config if config is None else config
    check_lengths(adapter.name, adapter.rope, config, layout.lengths)
    if not isinstance(linears, Linears):
        read = linears_of_config(config) if linears is None else None
        linears = linears_called(linears or read, hardware, linear_cost, origin="the model's config" if read else "")
    model = Model(adapter=adapter, family=family, heads=family.heads, layers=family.layers)
    if kernel_cost is None and elsewhere(hardware):
        kernel_cost = KERNEL_COST
    handlers = make_handlers([*methods, *(preset.configs if preset else ())], model)
    prediction = predict(handlers, family, layout, steps, preset, kernel_cost=kernel_cost, linears=linears)
    return replace(prediction, height=height, width=width, num_frames=frames)


def predict(
    handlers: Sequence[Handler],
    family: Family,
    layout: TokenLayout,
    steps: int,
    preset: PresetMethods | None = None,
    *,
    kernel_cost: float | None = None,
    linears: Linears | None = None,
) -> Prediction:
    """Predict a run of `steps` denoising steps over a layout, with methods as they are on its model.

    ``preset``: which of the methods are a preset's, so that what their cache skips was measured.
    """
    savings = {handler.name: handler.estimate(layout, steps) for handler in handlers}
    savings |= _measured_skips(handlers, savings, family.forwards_per_step, steps, preset)
    (step, scale), (patch_frames, patch_height, patch_width) = family.vae, family.patch
    dense = _dense_run(family, layout, steps, linears)
    tiles = tiles_left(savings, steps, family.layers, tiles_a_side(layout))
    measured = None
    if kernel_cost is None and tiles and not tiles.rows_alone:
        measured = measured_cost(family.head_dim, layout.tokens, tiles.density)
    cost, words = measured or (kernel_cost or KERNEL_COST, "")
    waits = [handler.name for handler in handlers if steps < (getattr(handler.settings, "min_steps", None) or 0)]
    return Prediction(
        family=family,
        layout=layout,
        height=layout.height * scale * patch_height,
        width=layout.width * scale * patch_width,
        num_frames=1 + (layout.frames * patch_frames - 1) * step,
        num_inference_steps=steps,
        methods={handler.name: handler.settings.to_dict() for handler in handlers},
        savings=savings,
        tiles=tiles,
        kernel_cost=cost,
        cost_measured=words,
        linears=linears,
        weight_bytes=weights_of(family, linears),
        uncounted_methods=tuple(n for n, saving in savings.items() if not saving.counted and n not in waits),
        notes=(*_notes(savings, tiles), *([words] if words else []), *(linears.notes if linears else ())),
        warnings=tuple(text for saving in savings.values() for text in saving.warnings),
        **dense,
        **_planned_run(savings, tiles, layout, cost, bool(words), steps=steps, layers=family.layers, **dense),
        **_memory(savings, tiles, family),
    )


def _notes(savings: Mapping[str, Saving], tiles: TilesLeft | None) -> list[str]:
    notes = [note for saving in savings.values() for note in saving.notes]
    if tiles and 0 < tiles.dense_share < 1 and any(part.forwards and not part.skipped for part in savings.values()):
        notes.append(
            "skipped forwards are counted as if dense and sparse steps were skipped alike; a cache computes the first "
            "steps, which are dense, so that a little less is gained"
        )
    return notes


def predict_attached(
    handlers: Sequence[Handler], layout: TokenLayout, steps: int, preset: PresetMethods | None, transformer: nn.Module
) -> PredictedSpeedup | None:
    """Predict the speed-up of attached methods; None where the model has no released model's sizes.

    The transformer's linear layers may be in 8 bits, as they are in its dense run too.
    """
    family = handlers[0].model.family if handlers else None
    if family is None:
        return None
    try:
        run = predict(handlers, family, layout, steps, preset, linears=linears_of(transformer))
    except ConfigError:  # such as methods whose tiles can't be counted together
        return None
    linears = str(run.linears or "")
    return PredictedSpeedup(speedup=run.speedup_of_methods, uncounted=run.uncounted_methods, linears=linears)


def _measured_skips(
    handlers: Sequence[Handler], savings: Mapping[str, Saving], rows: int, steps: int, preset: PresetMethods | None
) -> dict[str, Saving]:
    """Return the savings of a preset's caches, by the share of the forwards that they were measured to skip."""
    measured: dict[str, Saving] = {}
    promises = preset.promises(steps) if preset else {}
    for handler in handlers:
        cache, promise = handler.settings, promises.get(handler.name)
        if promise is None or not isinstance(cache, StepCacheConfig):
            continue
        # A cache computes the first steps, which stay dense too, whatever happens: it skips the cheap ones.
        may = frozenset(step for step in range(steps) if cache.always_computed(step, steps) is None)
        rate = min(1.0, promise.skipped * steps / max(1, len(may)))
        at = " and ".join(map(str, promise.steps))
        note = (
            f"{handler.name} is counted with {rate * len(may) / steps:.0%} of the forwards skipped, as measured on "
            f"tiny models at {at} steps"
        )
        measured[handler.name] = replace(
            savings[handler.name], forwards=rate * len(may) * rows, skipped=may, rate=rate, counted=True,
            notes=(note,),
        )  # fmt: skip
    return measured


def _dense_run(family: Family, layout: TokenLayout, steps: int, linears: Linears | None) -> dict[str, Any]:
    """Compute the fields of a `Prediction` on the run without methods."""
    forwards = steps * family.forwards_per_step
    blocks = forwards * family.layers
    attention = blocks * attention_flops(family, layout.tokens)
    total = attention + blocks * other_flops(family, layout)
    sizes = {axis: trained for axis, (_, trained) in beyond_trained(family, layout).items()}
    trained = replace(layout, **sizes)
    usual = blocks * (attention_flops(family, trained.tokens) + other_flops(family, trained))
    return dict(
        forwards=forwards,
        attention_flops=attention,
        total_flops=total,
        times_trained=total / usual,
        attention_share=attention / total,
        linear_share=blocks * linear_flops(family, layout) / total,
        linear_time=linears.time(family, layout) if linears else 1.0,
    )


def _planned_run(
    savings: Mapping[str, Saving],
    tiles: TilesLeft | None,
    layout: TokenLayout,
    kernel_cost: float,
    measured: bool,
    **dense: Any,
) -> dict[str, Any]:
    """Compute the fields of a `Prediction` on the run with methods; the letters are those of its fields.

    ``dense`` are the figures of the run without methods, its steps and layers.
    """
    forwards, attention_flops, total_flops = dense["forwards"], dense["attention_flops"], dense["total_flops"]
    skipped = 1 - math.prod(1 - saving.forwards / forwards for saving in savings.values())
    extra = sum(saving.extra_forwards for saving in savings.values()) / forwards
    blocks = max(0.0, 1 - sum(saving.blocks for saving in savings.values()) / (forwards * dense["layers"]))
    share = max(0.0, 1 + extra - skipped) * blocks
    a, w, rho, kappa = dense["attention_share"], 1.0, 1.0, kernel_cost
    if tiles is not None:
        visual, tokens = layout.visual_tokens**2, layout.tokens**2
        pooled = layout.visual_tokens * math.isqrt(tiles.total) if tiles.pools else 0
        exact_rows = sum(saving.exact_rows for saving in savings.values())
        w = tiles.dense_share
        rho = (tiles.density * visual + (1 - tiles.density) * pooled + tokens - visual) / tokens + exact_rows
        kappa = 1.0 if tiles.rows_alone else kernel_cost
        if measured and rho and not tiles.pools:  # what a race shows to be slower goes to dense attention
            kappa = min(kappa, 1 / rho)
    saved = dense["linear_share"] * (1 - dense["linear_time"])
    time = 1 - a + a * (w + (1 - w) * rho * kappa)
    factors = {"forwards": 1 / share if share else math.inf, "attention": 1 / time, "linears": time / (time - saved)}
    speedup = math.prod(factors.values())
    planned_attention = round(attention_flops * (w + (1 - w) * rho) * share)
    return dict(
        planned_attention_flops=planned_attention,
        planned_total_flops=round((total_flops - attention_flops) * share) + planned_attention,
        dense_share=w,
        pair_density=rho,
        cost_of_pairs=kappa,
        forward_share=share,
        computed_blocks=max(0.0, 1 - skipped) * blocks,
        factors=factors,
        speedup=speedup,
        speedup_of_methods=speedup * (1 - saved),
        equal_steps=dense["steps"] / speedup,
    )


def _memory(savings: Mapping[str, Saving], tiles: TilesLeft | None, family: Family) -> dict[str, Any]:
    """Compute the fields of a `Prediction` on the memory that the methods hold."""
    carried = {name: saving.carried_bytes for name, saving in savings.items() if saving.carried_bytes}
    lists = sum(saving.list_bytes for saving in savings.values())
    per_tile = 2 * family.heads * family.head_dim * ASSUMED_BYTES
    pooled = math.isqrt(tiles.total) * per_tile if tiles is not None and tiles.pools else 0
    state = lists + pooled + sum(carried.values())
    return dict(tile_list_bytes=lists, pooled_bytes=pooled, carried_bytes=carried, state_bytes=state)
