"""Estimates, by arithmetic alone, what a run costs and what methods would save: tokens, FLOPs, memory, speed-up.

A product of two n x n matrices counts 2 n^3 FLOPs. Counted per transformer forward: the four projections of the
self-attention, its Q K^T and P V, the query and output projections of the cross-attention with its Q K^T and P V, and
the two matrices of the feed-forward. Not counted: embeddings, norms, modulation, text encoder, autoencoder, sampler;
together a few percent at most. What a method saves it declares itself, by `Handler.estimate`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..adapters.adapter import Adapter, Family
from ..adapters.rotary import check_lengths
from ..errors import ConfigError
from ..methods.base import Handler, Model
from ..methods.compose import make_handlers
from ..methods.config import MethodConfig
from ..methods.saving import Saving
from ..plan.layout import TokenLayout
from ..plan.tiling import TILE
from ..report.html import lines, piece, table
from .beyond import beyond_trained
from .linears import ASSUMED_BYTES, LINEAR_COST, Linears, least_weights, linear_flops, linears_called, linears_of_config
from .sizes import check_steps, rounded_frames, token_layout
from .tiles import TilesLeft, tiles_left

KERNEL_COST = 1.15
"""Time of a sparse kernel per kept FLOP over that of the dense kernel, measured at 1.05 to 1.65 on GPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a run costs and what the methods save. FLOPs are of the whole run: all steps, forwards and layers.

    Attributes:
        family: the model's sizes.
        layout: the token layout.
        height: output height in pixels.
        width: output width in pixels.
        num_frames: output frames, rounded as the pipeline does.
        num_inference_steps: denoising steps.
        methods: method name -> its options on this model.
        savings: method name -> what it declares.
        tiles: what the methods together leave of the attention's tiles; None where none thins it out.
        kernel_cost: time per kept FLOP of the sparse kernel over the dense one's, kappa.
        linears: how the linear layers compute; None: in 16 bits, as all else does.
    """

    family: Family
    layout: TokenLayout
    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    savings: Mapping[str, Saving] = field(default_factory=dict)
    tiles: TilesLeft | None = None
    kernel_cost: float = KERNEL_COST
    linears: Linears | None = None

    @property
    def forwards(self) -> int:
        """Transformer forwards of the dense run, one per batch row."""
        return self.num_inference_steps * self.family.forwards_per_step

    @property
    def attention_flops(self) -> int:
        """Q K^T and P V of all self-attention, dense."""
        return self.forwards * self.family.layers * attention_flops(self.family, self.layout.tokens)

    @property
    def total_flops(self) -> int:
        """Everything that is counted, dense."""
        return self.attention_flops + self.forwards * self.family.layers * other_flops(self.family, self.layout)

    @property
    def times_trained(self) -> float:
        """FLOPs of the dense run over those of one of the trained size; 1 where it is no larger, or not known."""
        sizes = {axis: trained for axis, (_, trained) in beyond_trained(self.family, self.layout).items()}
        if not sizes:
            return 1.0
        layout = replace(self.layout, **sizes)
        layers = self.forwards * self.family.layers
        trained = attention_flops(self.family, layout.tokens) + other_flops(self.family, layout)
        return self.total_flops / (layers * trained)

    @property
    def attention_share(self) -> float:
        """Self-attention's share of the dense run's FLOPs, a."""
        return self.attention_flops / self.total_flops

    @property
    def linear_share(self) -> float:
        """The linear layers' share of the dense run's FLOPs, b."""
        return self.forwards * self.family.layers * linear_flops(self.family, self.layout) / self.total_flops

    @property
    def linear_time(self) -> float:
        """Time of the linear layers over that in 16 bits, lambda."""
        return self.linears.time(self.family, self.layout) if self.linears else 1.0

    @property
    def saved_by_linears(self) -> float:
        """What the linear layers save, as a share of the time of the dense run in 16 bits: b (1 - lambda)."""
        return self.linear_share * (1 - self.linear_time)

    @property
    def pair_density(self) -> float:
        """Share of the query-key pairs that a planned call computes, text and probe rows included: rho.

        A pooled tile is one key.
        """
        if self.tiles is None:
            return 1.0
        visual, tokens = self.layout.visual_tokens**2, self.layout.tokens**2
        pooled = self.layout.visual_tokens * math.isqrt(self.tiles.total) if self.tiles.pools else 0
        computed = self.tiles.density * visual + (1 - self.tiles.density) * pooled
        exact_rows = sum(saving.exact_rows for saving in self.savings.values())
        return (computed + tokens - visual) / tokens + exact_rows

    @property
    def cost_of_pairs(self) -> float:
        """Time per kept FLOP over the dense kernel's: 1 where whole rows are left out, and the kernel is dense."""
        return 1.0 if self.tiles is not None and self.tiles.rows_alone else self.kernel_cost

    @property
    def dense_share(self) -> float:
        """Share of the attention calls that stay dense, w."""
        return self.tiles.dense_share if self.tiles else 1.0

    @property
    def forward_share(self) -> float:
        """Computed forwards over the dense run's; extra forwards count, and skipped blocks as parts of a forward."""
        forwards = sum(saving.extra_forwards - saving.forwards for saving in self.savings.values())
        blocks = sum(saving.blocks for saving in self.savings.values()) / (self.forwards * self.family.layers)
        return max(0.0, 1 + forwards / self.forwards) * max(0.0, 1 - blocks)

    @property
    def computed_blocks(self) -> float:
        """Share of the dense run's blocks that are computed; those of extra forwards are not counted."""
        forwards = sum(saving.forwards for saving in self.savings.values()) / self.forwards
        blocks = sum(saving.blocks for saving in self.savings.values()) / (self.forwards * self.family.layers)
        return max(0.0, 1 - forwards) * max(0.0, 1 - blocks)

    @property
    def planned_attention_flops(self) -> int:
        """Q K^T and P V with the methods attached, dense steps and layers included."""
        kept = self.dense_share + (1 - self.dense_share) * self.pair_density
        return round(self.attention_flops * kept * self.forward_share)

    @property
    def planned_total_flops(self) -> int:
        """Everything that is counted, with the methods attached."""
        others = round((self.total_flops - self.attention_flops) * self.forward_share)
        return others + self.planned_attention_flops

    @property
    def speedup(self) -> float:
        """Predicted speed-up of the denoising loop over the dense one in 16 bits."""
        return math.prod(self.factors.values())

    @property
    def speedup_of_methods(self) -> float:
        """Predicted speed-up over the dense loop of the same model, whose linear layers compute as they do here."""
        return self.speedup * (1 - self.saved_by_linears)

    @property
    def factors(self) -> dict[str, float]:
        """What the speed-up is the product of: computed forwards and blocks, sparse attention, then linear layers."""
        named = {
            "attention_share": self.attention_share,
            "dense_share": self.dense_share,
            "density": self.pair_density,
            "kernel_cost": self.cost_of_pairs,
        }
        attention = predicted_speedup(**named)
        return {
            "forwards": 1 / self.forward_share if self.forward_share else math.inf,
            "attention": attention,
            "linears": predicted_speedup(**named, saved=self.saved_by_linears) / attention,
        }

    @property
    def weight_bytes(self) -> int:
        """Least memory of the transformer's weights: the matrices that every block has."""
        return least_weights(self.family, self.linears)

    @property
    def equal_steps(self) -> float:
        """Steps of a dense run that takes as long as the planned one."""
        return self.num_inference_steps / self.speedup

    @property
    def tile_list_bytes(self) -> int:
        """int32 tile lists and bitmaps on the device, shared by all layers, heads and steps."""
        return sum(saving.list_bytes for saving in self.savings.values())

    @property
    def carried_bytes(self) -> dict[str, int]:
        """Method name -> what it holds from step to step, one batch row, all branches and experts."""
        return {name: saving.carried_bytes for name, saving in self.savings.items() if saving.carried_bytes}

    @property
    def pooled_bytes(self) -> int:
        """Means of K and sums of V of one attention call, where tiles are pooled; bf16, one batch row."""
        if self.tiles is None or not self.tiles.pools:
            return 0
        tiles = math.isqrt(self.tiles.total)
        return 2 * tiles * self.family.heads * self.family.head_dim * ASSUMED_BYTES

    @property
    def state_bytes(self) -> int:
        """Memory that the methods hold besides the model."""
        return self.tile_list_bytes + self.pooled_bytes + sum(self.carried_bytes.values())

    @property
    def notes(self) -> list[str]:
        """What a user should know about the estimate."""
        told = [note for saving in self.savings.values() for note in saving.notes]
        if 0 < self.dense_share < 1 and any(saving.forwards and not saving.skipped for saving in self.savings.values()):
            told.append(
                "skipped forwards are counted as if dense and sparse steps were skipped alike; a cache computes the "
                "first steps, which are dense, so that a little less is gained"
            )
        return [*told, *(self.linears.notes if self.linears else [])]

    @property
    def warnings(self) -> list[str]:
        """What a user should know about the methods on this layout."""
        return [text for saving in self.savings.values() for text in saving.warnings]

    def _repr_html_(self) -> str:
        """Return the estimate as a notebook shows it."""
        size = f"{self.width} x {self.height} pixels, {self.num_frames} frames, {self.num_inference_steps} steps"
        rows = [("dense", f"{self.attention_flops:.3g}", f"{self.total_flops:.3g}", "1")]
        if self.methods or self.linears:
            planned = f"{self.planned_attention_flops:.3g}", f"{self.planned_total_flops:.3g}"
            layers = [f"linear layers {self.linears}"] if self.linears else []
            rows.append((" + ".join([*self.methods, *layers]), *planned, f"{self.speedup:.2f}"))
        head = ("", "FLOPs of attention", "FLOPs in all", "predicted speed-up")
        return piece(f"{self.family.name}: {size}", table(head, rows), lines([*self.warnings, *self.notes]))

    def to_dict(self) -> dict[str, Any]:
        """Return the estimate as plain numbers, for JSON; sizes in pixels, tokens, FLOPs and bytes."""
        whole, tiles = usual_tiles(self.layout) ** 2, self.tiles

        def values(*names: str) -> dict[str, Any]:
            return {name: getattr(self, name) for name in names}

        return {
            "family": self.family.name,
            "repo": self.family.repo,
            **values("height", "width", "num_frames", "num_inference_steps", "forwards"),
            "frames": self.layout.frames,
            "tokens_per_frame": self.layout.tokens_per_frame,
            "tokens": self.layout.visual_tokens,
            "text_tokens": self.layout.tokens - self.layout.visual_tokens,
            "tiles_total": tiles.total if tiles else whole,
            "tiles_kept": tiles.kept if tiles else whole,
            "density": tiles.density if tiles else 1.0,
            **values("dense_share", "forward_share", "computed_blocks", "attention_share", "attention_flops"),
            **values("total_flops", "times_trained", "planned_attention_flops", "planned_total_flops"),
            **values("tile_list_bytes", "pooled_bytes", "carried_bytes", "state_bytes", "kernel_cost"),
            "linears": self.linears and self.linears.kind,
            **values("linear_share", "linear_time", "weight_bytes", "factors"),
            "predicted_speedup": self.speedup,
            "equal_steps": self.equal_steps,
            "methods": {name: dict(options) for name, options in self.methods.items()},
            "uncounted_methods": [name for name, saving in self.savings.items() if not saving.counted],
        }


def usual_tiles(layout: TokenLayout) -> int:
    """Return how many tiles of the usual size are along each side of the visual attention."""
    return math.ceil(layout.visual_tokens / TILE)


def attention_flops(family: Family, tokens: int) -> int:
    """Return the FLOPs of Q K^T and P V of one self-attention call over S tokens: 4 S^2 H D."""
    return 4 * tokens**2 * family.heads * family.head_dim


def other_flops(family: Family, layout: TokenLayout) -> int:
    """Return the FLOPs of one block besides `attention_flops`: projections, cross-attention and feed-forward."""
    width = family.heads * family.head_dim
    return linear_flops(family, layout) + 4 * layout.tokens * family.cross_tokens * width


def predicted_speedup(
    *, attention_share: float, dense_share: float, density: float, kernel_cost: float, saved: float = 0.0
) -> float:
    """Return 1 / ((1 - a) - s + a (w + (1 - w) rho kappa)).

    Args:
        attention_share: a, self-attention's share of the dense run's time; its share of the FLOPs stands in for it.
        dense_share: w, share of the attention calls that stay dense.
        density: rho, share of the pairs a sparse call computes.
        kernel_cost: kappa, time of the sparse kernel per kept FLOP over that of the dense one.
        saved: s, what is saved beside attention, as a share of the dense run's time.
    """
    attention = dense_share + (1 - dense_share) * density * kernel_cost
    return 1 / (1 - attention_share - saved + attention_share * attention)


def estimate(
    adapter: Adapter,
    family: Family,
    *,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    num_inference_steps: int | None = None,
    methods: Sequence[MethodConfig] = (),
    kernel_cost: float = KERNEL_COST,
    config: Mapping[str, Any] | None = None,
    linears: str | Linears | None = None,
    hardware: str | None = None,
    linear_cost: float = LINEAR_COST,
) -> Estimate:
    """Estimate a run of a model with methods attached; what is left out takes the family's default.

    Sizes are those of `Estimate`. The transformer's ``config`` tells how long its tables of positions are, and whether
    its weights are torchao's in 8 bits; None: the family's.

    Args:
        linears: how the linear layers compute: ``int8`` or ``fp8``, weights and activations, or ``weight-only``; None:
            as the config says, else in 16 bits.
        hardware: the card whose figures count for them, as `find_hardware` knows it; None: an H100.
        linear_cost: time of an 8-bit product per FLOP over what the card's data sheet gives.

    Raises:
        ConfigError: for sizes the model can't make or has no positions for, methods it can't take or that can't be
            attached together, or linear layers for which the card has no unit.
    """
    height, width = height or family.height, width or family.width
    steps = family.num_inference_steps if num_inference_steps is None else num_inference_steps
    check_steps(steps)
    if not 0 < kernel_cost < 1000:
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
    found = estimate_run(make_handlers(methods, model), family, layout, steps, kernel_cost, linears)
    return replace(found, height=height, width=width, num_frames=frames)


def estimate_run(
    handlers: Sequence[Handler],
    family: Family,
    layout: TokenLayout,
    steps: int,
    kernel_cost: float = KERNEL_COST,
    linears: Linears | None = None,
) -> Estimate:
    """Estimate a run of so many steps over a layout, with methods as they are on its model.

    Raises:
        ConfigError: if what the methods save can't be counted, alone or together.
    """
    savings = {handler.name: handler.estimate(layout, steps) for handler in handlers}
    (step, scale), (patch_frames, patch_height, patch_width) = family.vae, family.patch
    return Estimate(
        family=family,
        layout=layout,
        height=layout.height * scale * patch_height,
        width=layout.width * scale * patch_width,
        num_frames=1 + (layout.frames * patch_frames - 1) * step,
        num_inference_steps=steps,
        methods={handler.name: handler.settings.to_dict() for handler in handlers},
        savings=savings,
        tiles=tiles_left(savings, steps, family.layers, usual_tiles(layout)),
        kernel_cost=kernel_cost,
        linears=linears,
    )
