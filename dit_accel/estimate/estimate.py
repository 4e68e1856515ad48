"""Estimates, by arithmetic alone, what a run costs and what methods would save: tokens, FLOPs, memory, speed-up.

A product of two n x n matrices counts 2 n^3 FLOPs. Counted per transformer forward: the four projections of the
self-attention, its Q K^T and P V, the query and output projections of the cross-attention with its Q K^T and P V, and
the two matrices of the feed-forward. Not counted: embeddings, norms, modulation, text encoder, autoencoder, sampler;
together a few percent at most.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..adapters.adapter import Adapter, Family
from ..errors import ConfigError
from ..methods.config import MethodConfig
from ..plan.layout import TokenLayout
from .sparsity import Sparsity, routes, sparsity_of

KERNEL_COST = 1.15
"""Time of a sparse kernel per kept FLOP over that of the dense kernel, measured at 1.05 to 1.65 on GPUs."""

TILE = 128
"""Tokens of a tile where no method says otherwise."""

ASSUMED_BYTES = 2
"""Bytes of a K or V element on a GPU, bf16 or fp16."""


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
        sparsity: what a method leaves of the attention; None for a dense run.
        uncounted: names of the methods whose saving is not known before the run.
        carried_bytes: method name -> what it holds from step to step, one batch row, all branches and experts.
        kernel_cost: time per kept FLOP of the sparse kernel over the dense one's, kappa.
    """

    family: Family
    layout: TokenLayout
    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    sparsity: Sparsity | None = None
    uncounted: tuple[str, ...] = ()
    carried_bytes: Mapping[str, int] = field(default_factory=dict)
    kernel_cost: float = KERNEL_COST

    @property
    def forwards(self) -> int:
        """Transformer forwards of the run, one a batch row."""
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
    def attention_share(self) -> float:
        """Self-attention's share of the dense run's FLOPs, a."""
        return self.attention_flops / self.total_flops

    @property
    def pair_density(self) -> float:
        """Share of the query-key pairs that a sparse call computes, text included: rho; a pooled tile is one key."""
        if self.sparsity is None:
            return 1.0
        visual, tokens = self.layout.visual_tokens**2, self.layout.tokens**2
        pooled = self.layout.visual_tokens * math.isqrt(self.sparsity.total) if self.sparsity.pools else 0
        computed = self.sparsity.density * visual + (1 - self.sparsity.density) * pooled
        return (computed + tokens - visual) / tokens

    @property
    def dense_share(self) -> float:
        """Share of the attention calls that stay dense, w."""
        return self.sparsity.dense_share if self.sparsity else 1.0

    @property
    def planned_attention_flops(self) -> int:
        """Q K^T and P V with the methods attached, dense steps and layers included."""
        kept = self.dense_share + (1 - self.dense_share) * self.pair_density
        return round(self.attention_flops * kept)

    @property
    def planned_total_flops(self) -> int:
        """Everything that is counted, with the methods attached."""
        return self.total_flops - self.attention_flops + self.planned_attention_flops

    @property
    def speedup(self) -> float:
        """Predicted speed-up of the denoising loop."""
        return predicted_speedup(
            attention_share=self.attention_share,
            dense_share=self.dense_share,
            density=self.pair_density,
            kernel_cost=self.kernel_cost,
        )

    @property
    def equal_steps(self) -> float:
        """Steps of a dense run that takes as long as the planned one."""
        return self.num_inference_steps / self.speedup

    @property
    def tile_list_bytes(self) -> int:
        """int32 tile lists and bitmaps on the device, shared by all layers, heads and steps."""
        return 4 * self.sparsity.list_entries if self.sparsity else 0

    @property
    def pooled_bytes(self) -> int:
        """Means of K and sums of V of one attention call, where tiles are pooled; bf16, one batch row."""
        if self.sparsity is None or not self.sparsity.pools:
            return 0
        tiles = math.isqrt(self.sparsity.total)
        return 2 * tiles * self.family.heads * self.family.head_dim * ASSUMED_BYTES

    @property
    def state_bytes(self) -> int:
        """Memory that the methods hold beside the model."""
        return self.tile_list_bytes + self.pooled_bytes + sum(self.carried_bytes.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the estimate as plain numbers, for JSON; sizes in pixels, tokens, FLOPs and bytes."""
        tiles = math.ceil(self.layout.visual_tokens / TILE) ** 2
        sparsity = self.sparsity
        return {
            "family": self.family.name,
            "repo": self.family.repo,
            "height": self.height,
            "width": self.width,
            "num_frames": self.num_frames,
            "num_inference_steps": self.num_inference_steps,
            "forwards": self.forwards,
            "frames": self.layout.frames,
            "tokens_per_frame": self.layout.tokens_per_frame,
            "tokens": self.layout.visual_tokens,
            "text_tokens": self.layout.tokens - self.layout.visual_tokens,
            "tiles_total": sparsity.total if sparsity else tiles,
            "tiles_kept": sparsity.kept if sparsity else tiles,
            "density": sparsity.density if sparsity else 1.0,
            "dense_share": self.dense_share,
            "attention_share": self.attention_share,
            "attention_flops": self.attention_flops,
            "total_flops": self.total_flops,
            "planned_attention_flops": self.planned_attention_flops,
            "planned_total_flops": self.planned_total_flops,
            "tile_list_bytes": self.tile_list_bytes,
            "pooled_bytes": self.pooled_bytes,
            "carried_bytes": dict(self.carried_bytes),
            "state_bytes": self.state_bytes,
            "kernel_cost": self.kernel_cost,
            "predicted_speedup": self.speedup,
            "equal_steps": self.equal_steps,
            "methods": {method.name: method.to_dict() for method in sparsity.methods} if sparsity else {},
            "uncounted_methods": list(self.uncounted),
        }


def attention_flops(family: Family, tokens: int) -> int:
    """Return the FLOPs of Q K^T and P V of one self-attention call over S tokens: 4 S^2 H D."""
    return 4 * tokens**2 * family.heads * family.head_dim


def other_flops(family: Family, layout: TokenLayout) -> int:
    """Return the FLOPs of one block beside `attention_flops`: projections, cross-attention and feed-forward."""
    width, tokens = family.heads * family.head_dim, layout.tokens
    self_projections = 8 * tokens * width**2
    feed_forward = 4 * tokens * width * family.ffn_dim
    if not family.cross_tokens:
        return self_projections + feed_forward
    cross_projections = 4 * (tokens + family.cross_tokens) * width**2
    cross_attention = 4 * tokens * family.cross_tokens * width
    return self_projections + feed_forward + cross_projections + cross_attention


def predicted_speedup(*, attention_share: float, dense_share: float, density: float, kernel_cost: float) -> float:
    """Return 1 / ((1 - a) + a (w + (1 - w) rho kappa)).

    Args:
        attention_share: a, self-attention's share of the dense run's time; its share of the FLOPs stands in for it.
        dense_share: w, share of the attention calls that stay dense.
        density: rho, share of the pairs a sparse call computes.
        kernel_cost: kappa, time of the sparse kernel per kept FLOP over that of the dense one.
    """
    attention = dense_share + (1 - dense_share) * density * kernel_cost
    return 1 / (1 - attention_share + attention_share * attention)


def pixel_multiples(family: Family) -> tuple[int, int]:
    """Return what the output's height and width must be multiples of, in pixels."""
    height, width = (math.lcm(family.vae[1] * patch, family.size_multiple) for patch in family.patch[1:])
    return height, width


def rounded_frames(family: Family, num_frames: int) -> int:
    """Return the number of frames the pipeline makes of a request: t k + 1, as WanPipeline rounds.

    Raises:
        ConfigError: for a number under 1, or more than one frame of an image model.
    """
    if num_frames < 1:
        raise ConfigError(f"num_frames must be >= 1, got {num_frames}; 1 makes an image")
    step = family.vae[0]
    if step == 1:
        if num_frames != 1:
            raise ConfigError(f"{family.name} makes images, got num_frames {num_frames}; leave it out or set it to 1")
        return 1
    return num_frames if num_frames % step == 1 else num_frames // step * step + 1


def token_layout(family: Family, *, height: int, width: int, num_frames: int) -> TokenLayout:
    """Return the token layout of an output of so many pixels and (rounded) frames.

    Raises:
        ConfigError: for a size the model can't make, with the nearest one it can.
    """
    for name, value, multiple in zip(("height", "width"), (height, width), pixel_multiples(family), strict=True):
        check_multiple(name, value, multiple, family.name)
    (step, scale), (patch_frames, patch_height, patch_width) = family.vae, family.patch
    latent_frames = 1 + (num_frames - 1) // step
    return TokenLayout(
        frames=-(-latent_frames // patch_frames),  # models with a temporal patch pad the latents to whole patches
        height=height // (scale * patch_height),
        width=width // (scale * patch_width),
        text_after=family.text_tokens,
    )


def check_multiple(name: str, value: int, multiple: int, model: str) -> None:
    """Refuse a size in pixels that is no positive multiple of ``multiple``.

    Raises:
        ConfigError: with the nearest legal size.
    """
    if value < multiple or value % multiple:
        nearest = max(multiple, (value + multiple // 2) // multiple * multiple)
        raise ConfigError(f"{name} must be a multiple of {multiple} for {model}, got {value}; the nearest is {nearest}")


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
) -> Estimate:
    """Estimate a run of a model with methods attached; what is left out takes the family's default.

    Raises:
        ConfigError: for sizes the model can't make, or a method it can't take.
    """
    height, width = height or family.height, width or family.width
    steps = family.num_inference_steps if num_inference_steps is None else num_inference_steps
    if steps < 1:
        raise ConfigError(f"num_inference_steps must be >= 1, got {steps}")
    if not kernel_cost > 0:
        raise ConfigError(f"kernel_cost must be > 0, got {kernel_cost}; 1 is a sparse kernel as efficient as dense")
    frames = rounded_frames(family, family.num_frames if num_frames is None else num_frames)
    layout = token_layout(family, height=height, width=width, num_frames=frames)
    counted = [method for method in methods if hasattr(method, "tile_counts")]
    if len(counted) - any(map(routes, counted)) > 1 or sum(map(routes, counted)) > 1:
        names = " and ".join(method.name for method in counted)
        raise ConfigError(f"plan can't tell what {names} save together, got both; plan them one at a time")
    for method in methods:
        if method.name in adapter.refused:
            raise ConfigError(f"{method.name} makes no sense on {family.name}: {adapter.refused[method.name]}")
    return Estimate(
        family=family,
        layout=layout,
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=steps,
        sparsity=sparsity_of(counted, adapter, family, layout, steps) if counted else None,
        uncounted=tuple(method.name for method in methods if method not in counted),
        carried_bytes=_carried(methods, adapter, family, layout, steps),
        kernel_cost=kernel_cost,
    )


def _carried(
    methods: Sequence[Any], adapter: Adapter, family: Family, layout: TokenLayout, steps: int
) -> dict[str, int]:
    """Return what methods hold from step to step in the layers that they change; in Radial's tiles beside it."""
    sparse = [method for method in methods if hasattr(method, "is_dense")]
    full = [method.resolved(adapter.recipe(method.name, family)) for method in sparse]
    listed = [method.block_size for method in full if method.name == "radial"]
    found = {}
    for method in full:
        if hasattr(method, "state_bytes"):
            layers = sum(
                any(not method.is_dense(step, steps, layer, 0.0) for step in range(steps))
                for layer in range(family.layers)
            )
            sized = replace(method, block_size=listed[0]) if listed else method
            found[method.name] = sized.state_bytes(
                layout, layers=layers * family.experts, heads=family.heads, branches=family.forwards_per_step
            )
    return found
