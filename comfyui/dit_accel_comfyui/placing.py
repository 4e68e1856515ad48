"""Where a model of ComfyUI's puts the latents' tokens in its attention sequence, read off the forward's inputs."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from dit_accel.errors import ConfigError
from dit_accel.plan.layout import TokenLayout

Text = Literal["none", "before", "after"]

TEXT: Mapping[str, Text] = {"Flux": "before", "Chroma": "before", "QwenImageTransformer2DModel": "before",
                            "HunyuanVideo": "after"}  # fmt: skip
"""Model class -> where its text stands in the attention sequence; any other class attends over the latents alone."""

PATCHES: Mapping[str, tuple[int, int, int]] = {"LTXVModel": (1, 1, 1), "LTXAVModel": (1, 1, 1)}
"""Model class -> patch (frames, height, width), where the model does not tell it as ``patch_size``."""

EXTRA = ("ref_latent", "reference_latent", "time_dim_concat", "keyframe_idxs")
"""Inputs that put further tokens among the latents', in an order that differs by model."""


def inputs_of(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of a forward by name, the first as ``x``; those in its ``**kwargs`` stand beside the others."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    inputs: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        inputs |= dict(value) if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return {"x": next(iter(inputs.values()), None), **inputs}


def latents_of(inputs: Mapping[str, Any]) -> Tensor | None:
    """Return the latents of a forward, of a list the first; None where they are something else."""
    latents = inputs.get("x")
    if isinstance(latents, (list, tuple)) and latents:
        latents = latents[0]
    return latents if isinstance(latents, Tensor) else None


def layout_from_options(options: Mapping[str, Any], tokens: int) -> TokenLayout | None:
    """Return the layout of an attention call over so many tokens where the model tells it, as MiniMax-H3 does.

    Its sequence is packed: text, conditions and sound, then the video, which its ``minimax_h3_layout`` says the place
    and the size of. None where there is none, or it is of another sequence.
    """
    packed = options.get("minimax_h3_layout")
    if packed is None or packed.seq_len != tokens:
        return None
    _, frames, height, width, *_ = packed.signature
    grid = int(frames), int(height) // 2, int(width) // 2
    for start, stop, kind in reversed(packed.segments):
        if kind == "video" and stop - start == grid[0] * grid[1] * grid[2]:
            return TokenLayout(
                frames=grid[0], height=grid[1], width=grid[2], text_before=int(start), text_after=tokens - int(stop)
            )
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPlacement:
    """The patch grid of one forward, and where its text stands.

    Attributes:
        frames: F, latent frames after patching; 1 for an image.
        height: Y, patch rows.
        width: X, patch columns.
        text: where text tokens stand in the sequence.
        lengths: how many they may be.
        pictures: further pictures follow, whose tokens stand behind all others.
        beside: lengths of inputs that cross-attention may attend over.
    """

    frames: int
    height: int
    width: int
    text: Text = "none"
    lengths: tuple[int, ...] = (0,)
    pictures: bool = False
    beside: tuple[int, ...] = ()

    def layout(self, tokens: int) -> TokenLayout | str:
        """Return the layout of a self-attention call over so many tokens, or why it can't be told."""
        grid = f"{self.frames} x {self.height} x {self.width}"
        visual = self.frames * self.height * self.width
        if self.text == "none" and tokens in self.beside:
            return f"text has {tokens} tokens as the latents have, so that calls over them can't be told apart"
        before = self.lengths[0] if self.text == "before" else 0
        after = tokens - visual - before
        if after not in (self.lengths if self.text == "after" else (0,)) and not (self.pictures and after > 0):
            text = "" if self.text == "none" else f" and {' or '.join(map(str, self.lengths))} of text"
            return f"{tokens} tokens are not the latents' grid of {grid}{text}"
        return TokenLayout(
            frames=self.frames, height=self.height, width=self.width, text_before=before, text_after=after
        )


def placement_of(model: Any, inputs: Mapping[str, Any]) -> TokenPlacement | str:
    """Return where a forward's tokens stand, or in words why that can't be told.

    Args:
        model: ComfyUI's diffusion model.
        inputs: of the forward, by name; ``x`` are the latents, [B, C, H, W] or [B, C, T, H, W], or a list that begins
            with them and goes on with sound.
    """
    latents = latents_of(inputs)
    if latents is None or latents.ndim not in (4, 5):
        return "the latents are no tensor of 4 or 5 axes, whose tokens can be placed on a grid"
    for name in EXTRA:
        if inputs.get(name) is not None:
            return f"{name} puts tokens among those of the latents"
    names = [cls.__name__ for cls in type(model).__mro__]
    patch = next((PATCHES[name] for name in names if name in PATCHES), None) or _patch(model)
    if patch is None:
        return f"{names[0]} tells no patch_size, so that its tokens can't be placed on a grid"
    frames = latents.shape[2] if latents.ndim == 5 else 1
    sizes = [-(-size // part) for size, part in zip((frames, *latents.shape[-2:]), patch, strict=True)]
    known: list[Text] = [TEXT[name] for name in names if name in TEXT]
    text: Text = known[0] if known else "none"
    tokens = {name: value.shape[1] for name, value in inputs.items() if isinstance(value, Tensor) and value.ndim == 3}
    if text != "none" and "context" not in tokens:
        return "the forward was given no context, so that its text tokens can't be counted"
    lengths = (tokens["context"] + tokens.get("txt_byt5", 0),) if text != "none" else (0,)
    return TokenPlacement(
        frames=sizes[0], height=sizes[1], width=sizes[2], text=text, lengths=lengths,
        pictures=text == "before" and bool(inputs.get("ref_latents")),
        beside=(*tokens.values(), sum(tokens.values())),
    )  # fmt: skip


def _patch(model: Any) -> tuple[int, int, int] | None:
    """Return (frames, height, width) that one token covers, as a model's ``patch_size`` tells it; None: it does not."""
    size = getattr(model, "patch_size", None)
    if size is None and hasattr(model, "patch_spatial"):  # Cosmos
        size = (getattr(model, "patch_temporal", 1), model.patch_spatial, model.patch_spatial)
    if isinstance(size, int):
        return 1, size, size
    if not isinstance(size, (tuple, list)) or not all(isinstance(part, int) for part in size):
        return None
    return tuple(size) if len(size) == 3 else (1, *size) if len(size) == 2 else None  # type: ignore[return-value]


@dataclass(slots=True)
class Steps:
    """Which step of a sampling run a noise level belongs to.

    Attributes:
        sigmas: the run's noise levels, the last of which ends it; empty: not known.
    """

    sigmas: tuple[float, ...] = ()

    @property
    def count(self) -> int | None:
        """Steps of the run; None where they are not known."""
        return len(self.sigmas) - 1 if len(self.sigmas) > 1 else None

    def index(self, sigma: float) -> int:
        """Return the 0-based step that begins at a noise level, or else the one that leads across it."""
        if self.count is None:
            raise ConfigError("the sampler tells no list of noise levels (sample_sigmas); use one of ComfyUI's own")
        near = min(range(self.count), key=lambda step: abs(self.sigmas[step] - sigma))
        if abs(self.sigmas[near] - sigma) <= 1e-4 * max(abs(sigma), 1e-6):
            return near
        return max(sum(level > sigma for level in self.sigmas[:-1]) - 1, 0)
