"""Recommend: what each preset attaches to a model at a size, with the predicted speed-up and the measured loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..adapters import installed
from ..adapters.adapter import Adapter, Family
from ..errors import ConfigError
from ..methods.base import Model
from ..methods.find import find_transformers, resolve_model
from ..methods.presets import LEVELS, Choice, choices, spell
from .estimate import Estimate, estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One preset on a model at a size.

    Attributes:
        preset: its level.
        methods: what it attaches, in words.
        speedup: predicted, of the denoising loop: FLOPs of the sparse attention by `Estimate`, and the share of the
            forwards that the cache skipped where it was measured.
        psnr: dB to the user's own dense run where it was measured, the least mean of the measured models; None: not
            measured.
        state_bytes: memory that the methods hold besides the model, but for what a cache stores.
        sources: the figures that this rests on.
    """

    preset: str
    methods: str
    speedup: float
    psnr: float | None
    state_bytes: int
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """The presets on a model at a size, the fastest first.

    Attributes:
        family: the model's sizes.
        height: output height in pixels.
        width: output width in pixels.
        num_frames: output frames.
        num_inference_steps: denoising steps.
        settings: the presets.
    """

    family: str
    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    settings: Sequence[Setting]

    def to_dict(self) -> dict[str, Any]:
        """Return the recommendation as plain values, for JSON."""
        sizes = {name: getattr(self, name) for name in self.__slots__ if name != "settings"}
        settings = [{name: getattr(one, name) for name in Setting.__slots__} for one in self.settings]
        return {**sizes, "settings": [{**one, "sources": list(one["sources"])} for one in settings]}

    def __str__(self) -> str:
        lines = [
            f"{self.family}, {self.width} x {self.height}, {self.num_frames} frames, {self.num_inference_steps} steps; "
            'attach(pipe, preset="balanced")'
        ]
        for one in self.settings:
            loss = "loss not measured" if one.psnr is None else f"{one.psnr:.0f} dB to the dense run"
            lines.append(f"  {one.preset}: predicted {one.speedup:.2f} times as fast, {loss}; {one.methods}")
            lines += [f"    {source}" for source in one.sources]
        return "\n".join(lines)


def recommend(
    model: Any,
    *,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    num_inference_steps: int | None = None,
) -> Recommendation:
    """Tell what each preset attaches to a model at a size, with its predicted speed-up; loads and changes nothing.

    Args:
        model: a diffusers pipeline or transformer, or the name of a family, such as ``"wan2.1-14b"``.
        height: output height in pixels; None: the model's default, as of the other sizes.
        width: output width in pixels.
        num_frames: output frames.
        num_inference_steps: denoising steps.

    Raises:
        UnsupportedModel: if no adapter covers the model.
        ConfigError: for an unknown family, a model with the sizes of no released one, or sizes that it can't make.
    """
    adapter, family = _family_of(model)
    of = Model(adapter=adapter, family=family, heads=family.heads, layers=family.layers)
    sizes = dict(height=height, width=width, num_frames=num_frames, num_inference_steps=num_inference_steps)
    dense = estimate(adapter, family, **sizes)
    settings = [_setting(level, choices(level, of), adapter, family, sizes) for level in LEVELS]
    return Recommendation(
        family=family.name, height=dense.height, width=dense.width, num_frames=dense.num_frames,
        num_inference_steps=dense.num_inference_steps, settings=sorted(settings, key=lambda one: -one.speedup),
    )  # fmt: skip


def _family_of(model: Any) -> tuple[Adapter, Family]:
    if isinstance(model, str):
        family = installed.family(model)
        return next(one for one in installed.adapters().values() if family in one.families), family
    transformers = find_transformers(model)
    found = resolve_model(list(transformers)[-1], transformers)
    if found.family is None:
        raise ConfigError(
            f"recommend knows released models by their sizes, and {type(model).__name__} has those of none; name the "
            'family that is nearest, such as recommend("wan2.1-1.3b")'
        )
    return found.adapter, found.family


def _setting(
    level: str, chosen: Sequence[Choice], adapter: Adapter, family: Family, sizes: Mapping[str, Any]
) -> Setting:
    found: Estimate = estimate(adapter, family, methods=[one.config for one in chosen], **sizes)
    acting = [one for one in chosen if _acts(one, found)]
    skipped = max((one.skips or 0.0 for one in acting), default=0.0)
    measured = [one.psnr for one in acting if one.psnr is not None]
    known = all(one.psnr is not None for one in acting)
    return Setting(
        preset=level, methods=spell(level, acting).partition(": ")[2], speedup=found.speedup / (1.0 - skipped),
        psnr=min(measured) if measured and known else None, state_bytes=found.state_bytes,
        sources=tuple(f"{one.config.name}: {one.source}" for one in acting),
    )  # fmt: skip


def _acts(choice: Choice, found: Estimate) -> bool:
    """Tell whether a method does anything in a run of these sizes."""
    config = choice.config
    if (getattr(config, "min_steps", None) or 0) > found.num_inference_steps:
        return False
    if (getattr(config, "min_tokens", None) or 0) > found.layout.visual_tokens:
        return False
    return not choice.beyond or found.times_trained > 1
