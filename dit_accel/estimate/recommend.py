"""Recommend: what could be attached to a model at a size, fastest first, with what it is expected to cost."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..adapters import installed
from ..adapters.adapter import Adapter, Family
from ..adapters.model_files import ModelFiles, model_source, read_model_files
from ..errors import UnsupportedModel
from ..methods.base import AttentionHandler, Model
from ..methods.caches.cache_config import StepCacheConfig
from ..methods.find import find_transformers, resolve_model
from ..methods.presets import LEVELS, MEASURED_ON, Choice, preset_methods
from ..methods.registry import handler_of, method
from .beyond import advice, beyond_trained
from .estimate import Estimate, estimate
from .hardware import Hardware, find_hardware
from .linears import (
    ASSUMED_BYTES,
    Linears,
    least_weights,
    linears_called,
    linears_of,
    linears_of_config,
    weight_size,
)
from .recommend_table import text_of
from .skipped import speedup_with_skips
from .tuned import TunedSetting, find_tuned

DENSE = "dense"
"""The name of the row without methods."""

PREDICTED_NOTE = (
    "speed-ups of presets are predicted, of the denoising loop; memory is what the methods hold from step to step, "
    "without a step cache's few copies of the latents for each branch"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One thing that could be attached, or nothing.

    Attributes:
        name: a preset's level, ``dense``, or the name of a tuned file.
        methods: method -> what it does in this run, in words; of a preset those alone that act in it.
        speedup: of the denoising loop. Predicted: by the FLOPs of the sparse attention (`Estimate`), and by the share
            of the forwards that the cache skipped where that was measured. Of a tuned file measured, by work.
        seconds: the least that the loop takes on the hardware, by its data sheet; None: not known.
        losses: method -> dB to the user's own dense run that nine of ten prompts reached where it was measured, with as
            many steps or the nearest, the least of the tiny models; None: not measured; without those for outputs
            beyond the trained size, where the dense run is no measure. Of a tuned file its metric -> the mean against
            the converged run.
        medians: method -> the same dB of the median prompt, where it was measured.
        sources: method, or tuned file -> the figure that this rests on.
        state_bytes: memory that the methods hold besides the model, but for what a cache stores.
        needs: what else it takes, such as a GPU with Triton; and what of a preset waits for a larger run.
    """

    name: str
    methods: Mapping[str, str]
    speedup: float
    seconds: float | None
    losses: Mapping[str, float | None]
    medians: Mapping[str, float] = field(default_factory=dict)
    sources: Mapping[str, str]
    state_bytes: int
    needs: tuple[str, ...]

    @property
    def psnr(self) -> float | None:
        """The least of the presets' dB to the dense run; None where a method of it was not measured, or none acts."""
        values = [*self.losses.values()]
        return min((value for value in values if value is not None), default=None) if None not in values else None


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Recommendation:
    """What could be attached to a model at a size: what was tuned on it, then presets and dense, the fastest first.

    Attributes:
        family: the model's sizes.
        height: output height in pixels.
        width: output width in pixels.
        num_frames: output frames, rounded as the pipeline does.
        num_inference_steps: denoising steps.
        tokens: visual tokens of one attention call.
        hardware: name of the card or its memory, or None.
        weight_bytes: of the transformers: of a pipeline what it has, of a named model at least the matrices of its
            blocks in 16 bits.
        settings: the rows.
        notes: what a user should know.
    """

    family: str
    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    tokens: int
    hardware: str | None
    weight_bytes: int
    settings: Sequence[Setting]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the recommendation as plain values, for JSON."""
        settings = [{**asdict(one), "needs": list(one.needs), "psnr": one.psnr} for one in self.settings]
        values = {name: getattr(self, name) for name in Recommendation.__slots__}
        return {**values, "settings": settings, "notes": list(self.notes)}

    def __str__(self) -> str:
        return text_of(self)

    __repr__ = __str__


@dataclass(frozen=True, slots=True, kw_only=True)
class _Subject:
    """A model as it was given: its adapter, sizes and config, its weights in bytes, and what tuned files call it.

    ``linears`` are those of a loaded model, whose own run is what speed-ups are over.
    """

    adapter: Adapter
    family: Family
    config: Mapping[str, Any]
    weight_bytes: int
    source: str
    linears: Linears | None = None

    @property
    def model(self) -> Model:
        family = self.family
        return Model(adapter=self.adapter, family=family, heads=family.heads, layers=family.layers)


def recommend(
    model: Any,
    *,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    num_inference_steps: int | None = None,
    hardware: str | None = None,
) -> Recommendation:
    """List what could be attached to a model at a size, with predicted speed-up, loss and memory; changes nothing.

    Args:
        model: a diffusers pipeline or transformer; the name of a family, such as ``"wan2.1-14b"``; or a hub id, a
            folder of a pipeline or an embedded model, of which only the configs are read.
        height: output height in pixels; None: the model's default, as of the other sizes.
        width: output width in pixels.
        num_frames: output frames.
        num_inference_steps: denoising steps.
        hardware: a card, such as ``"h100"``, of which the least seconds are given too, or its memory, such as
            ``"24GB"``.

    Raises:
        UnsupportedModel: if no adapter covers the model, or no family is called so.
        ConfigError: for sizes that the model can't make, unknown hardware, or a tuned file that can't be read.
    """
    card = None if hardware is None else find_hardware(hardware)
    of = _subject(model, card if card and card.tflops else None)
    sizes: dict[str, Any] = dict(
        height=height, width=width, num_frames=num_frames, num_inference_steps=num_inference_steps, config=of.config,
        linears=of.linears,
    )  # fmt: skip
    dense = estimate(of.adapter, of.family, **sizes)
    rows = [_dense_row(), *(_preset_row(level, of, sizes, dense) for level in LEVELS)]
    rows.sort(key=lambda one: -round(one.speedup, 2))
    tuned = find_tuned(of.source) if of.source else []
    fitting = [one for one in tuned if _fits(one, dense)]
    rows = [*(_tuned_row(one) for one in fitting), *rows]
    seconds = None if card is None else card.seconds(dense)
    if seconds is not None:
        rows = [replace(one, seconds=seconds / one.speedup) for one in rows]
    return Recommendation(
        family=of.family.name, height=dense.height, width=dense.width, num_frames=dense.num_frames,
        num_inference_steps=dense.num_inference_steps, tokens=dense.layout.visual_tokens,
        hardware=card.name if card else None, weight_bytes=of.weight_bytes, settings=rows,
        notes=_notes(of, dense, num_frames, card, [one for one in tuned if one not in fitting]),
    )  # fmt: skip


def _subject(model: Any, card: Hardware | None) -> _Subject:
    if isinstance(model, Path) or (isinstance(model, str) and model not in installed.families()):
        if isinstance(model, str) and "/" not in model and not Path(model).is_dir():
            installed.family(model)  # refuses it, with the nearest name
        files = read_model_files(model_source(str(model)))
        adapter, family = files.identify()
        kind = linears_of_config(files.transformer)
        linears = linears_called(kind, card, origin="the model's config") if kind else None
        return _Subject(
            adapter=adapter, family=family, config=files.transformer, weight_bytes=least_weights(family, linears),
            source=str(model), linears=linears,
        )  # fmt: skip
    if isinstance(model, str):
        adapter, family = installed.described(model)
        weights = least_weights(family)
        return _Subject(adapter=adapter, family=family, config=family.config, weight_bytes=weights, source=family.repo)
    transformers = find_transformers(model)
    found = resolve_model(list(transformers)[-1], transformers)
    config = dict(transformers[list(transformers)[-1]].config)
    family = found.family or _sizes_of(transformers, config)
    return _Subject(
        adapter=found.adapter, family=family, config=config, weight_bytes=sum(map(_weights, transformers.values())),
        source=str(getattr(getattr(model, "config", {}), "get", lambda _: None)("_name_or_path") or ""),
        linears=linears_of(transformers[list(transformers)[-1]], card),
    )  # fmt: skip


def _sizes_of(transformers: Mapping[str, Any], config: Mapping[str, Any]) -> Family:
    """Return the sizes of a model that is no released one, by its config, with its family's defaults.

    Raises:
        UnsupportedModel: if the config does not tell them.
    """
    name = type(list(transformers.values())[-1]).__name__
    index = {part: ("diffusers", name) for part in transformers}
    files = ModelFiles(name=name, index=index, transformer={**config, "_class_name": name}, vae={})
    try:
        return files.identify()[1]
    except UnsupportedModel as error:
        raise UnsupportedModel(
            f'recommend can\'t tell the sizes of {name} ({error}); name the nearest family: recommend("wan2.1-1.3b")'
        ) from None


def _weights(transformer: Any) -> int:
    return sum(ASSUMED_BYTES * one.numel() if one.is_meta else weight_size(one) for one in transformer.parameters())


def _dense_row() -> Setting:
    return Setting(
        name=DENSE, methods={}, speedup=1.0, seconds=None, losses={}, sources={}, state_bytes=0, needs=()
    )  # fmt: skip


def _preset_row(level: str, of: _Subject, sizes: Mapping[str, Any], dense: Estimate) -> Setting:
    chosen = preset_methods(level, of.model).chosen
    idle = {one.config.name: _idle(one, dense, of.family) for one in chosen}
    acting = [one for one in chosen if idle[one.config.name] is None]
    found = estimate(of.adapter, of.family, methods=[one.config for one in acting], **sizes)
    speedup = found.speedup_of_methods
    promises = {one.config.name: one.promise(dense.num_inference_steps, of.family.name) for one in acting}
    for name, promise in promises.items():
        cache = method(name)(**found.methods[name])
        if promise is not None and isinstance(cache, StepCacheConfig):
            speedup = speedup_with_skips(found, cache, promise.skipped)
    beyond = {one.config.name for one in acting if one.beyond}
    planned = [one.config.name for one in acting if issubclass(handler_of(one.config), AttentionHandler)]
    needs = [f"{', '.join(planned)}: a GPU with Triton"] if planned else []
    return Setting(
        name=level, methods={one.config.name: one.what for one in acting}, speedup=speedup, seconds=None,
        losses={name: one and one.tenth for name, one in promises.items() if name not in beyond},
        medians={name: one.median for name, one in promises.items() if one is not None},
        sources={one.config.name: one.source for one in acting}, state_bytes=found.state_bytes,
        needs=(*needs, *(why for why in idle.values() if why)),
    )  # fmt: skip


def _idle(choice: Choice, run: Estimate, family: Family) -> str | None:
    """Return why a method does nothing in a run of these sizes, empty: it is for larger ones alone; None: it acts."""
    config, tokens, steps = choice.config, run.layout.visual_tokens, run.num_inference_steps
    least_steps, least_tokens = (getattr(config, name, None) or 0 for name in ("min_steps", "min_tokens"))
    if least_steps > steps:
        return f"{config.name} waits for {least_steps} steps, here {steps}"
    if least_tokens > tokens:
        return f"{config.name} waits for {least_tokens:,} tokens, here {tokens:,}"
    within = choice.beyond and not handler_of(config).extends & beyond_trained(family, run.layout).keys()
    return "" if within else None


def _fits(tuned: TunedSetting, dense: Estimate) -> bool:
    """Return whether a setting was tuned at the size and number of steps of a dense run."""
    names = ("height", "width", "num_frames", "num_inference_steps")
    return all(getattr(tuned.measured, name) == getattr(dense, name) for name in names)


def _tuned_row(one: TunedSetting) -> Setting:
    found = one.measured
    methods = {method.name: ", ".join(f"{k} {v}" for k, v in method.to_dict().items()) for method in one.methods}
    run = {"run": ", ".join(f"{name} {value}" for name, value in one.run.items())}
    return Setting(
        name=one.path.stem, methods={**run, **methods}, speedup=found.speedup, seconds=None,
        losses={found.metric: found.quality}, state_bytes=0, needs=("generate --config FILE",),
        sources={
            one.path.stem: f"tuned on this model by dit-accel tune pipeline, {found.prompts} held-out prompts, "
            f"{found.metric} to the converged run: {one.path}"
        },
    )  # fmt: skip


def _notes(
    of: _Subject, dense: Estimate, num_frames: int | None, card: Hardware | None, elsewhere: Sequence[TunedSetting]
) -> tuple[str, ...]:
    notes: list[str] = []
    if num_frames is not None and num_frames != dense.num_frames:
        notes.append(f"{num_frames} frames are rounded to {dense.num_frames}, as the pipeline does")
    name = of.family.name
    if name not in MEASURED_ON:
        notes.append(
            f"no preset was measured on {name}: this is the general rule, with the PSNR and skipped forwards of the "
            f"tiny models {' and '.join(MEASURED_ON)}; attachment.check(prompt) measures yours, `dit-accel tune "
            "pipeline` finds settings for it"
        )
    presets = preset_methods(LEVELS[-1], of.model).configs
    notes += advice(of.adapter, of.family, dense.layout, presets)
    if dense.linears is not None:
        notes += [*dense.linears.notes, "speed-ups are over the dense run of the model as it is"]
    if card is not None:
        notes += _card_notes(of, card)
    notes.append(PREDICTED_NOTE)
    for one in elsewhere:
        found = one.measured
        notes.append(
            f"tuned at another size, {found.width} x {found.height}, {found.num_frames} frames, "
            f"{found.num_inference_steps} steps: {one.path}"
        )
    return tuple(notes)


def _card_notes(of: _Subject, card: Hardware) -> list[str]:
    gib = of.weight_bytes / 2**30
    notes = []
    weights = f"the transformer's weights alone take {gib:.3g} GiB or more"
    if gib > card.gib:
        notes.append(
            f"{weights}, beyond the {card.gib:g} GiB there are: generate with --offload group or sequential, or "
            "quantize them"
        )
    elif gib > card.gib / 2:
        notes.append(
            f"{weights} of the {card.gib:g} GiB there are; text encoders and VAE come on top, and if they do not fit "
            "beside them, --offload model moves in what is used"
        )
    if card.tflops is not None:
        notes.append(
            f"seconds are the least that the products take on {card.name} by its data sheet, the denoising loop "
            "alone; expect more"
        )
    return notes
