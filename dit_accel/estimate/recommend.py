"""Recommend: what could be attached to a model at a size, fastest first, with what it is expected to cost."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..adapters import installed
from ..adapters.adapter import Adapter, Family
from ..adapters.model_files import ModelFiles, model_source, read_model_files
from ..errors import ConfigError, UnsupportedModel
from ..methods.base import AttentionHandler, Model
from ..methods.few_steps import FEW, MOST
from ..methods.find import find_transformers, resolve_model
from ..methods.presets import LEVELS, MEASURED_ON, Choice, PresetMethods, preset_methods
from ..methods.registry import handler_of
from .hardware import (
    Hardware,
    Linears,
    find_hardware,
    linears_called,
    linears_of,
    linears_of_config,
    weight_size,
    weights_of,
)
from .kept_races import elsewhere
from .prediction import KERNEL_COST, Prediction, estimate
from .recommendation import Recommendation, Setting
from .sizes import advice, beyond_trained
from .tuned import TunedSetting, find_tuned
from .work import ASSUMED_BYTES

DENSE = "dense"
"""The name of the row without methods."""

PREDICTED_NOTE = (
    "speed-ups of presets are predicted, of the denoising loop; memory is what the methods hold from step to step, "
    "without a step cache's few copies of the latents for each branch"
)

FEW_NOTE = (
    f"runs of {MOST} steps or fewer are for distilled models: there the levels' step caches skip nothing; few-steps "
    "kept 35 dB or more of the own run (10th percentile) on LoRAs of 4 and 8 steps of two small models, as much work "
    "in fewer steps 24 to 32 (docs/presets.md)"
)


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
    quantize: str | None = None,
) -> Recommendation:
    """List what could be attached to a model at a size, with predicted speed-up, loss and memory; changes nothing.

    Args:
        model: a diffusers pipeline or transformer; the name of a family, such as ``"wan2.1-14b"``; or a hub id, a
            folder of a pipeline or an embedded model, of which only the configs are read.
        height: output height in pixels; None: the model's default, as of the other sizes.
        hardware: a card, such as ``"h100"``, of which the least seconds are given too, or its memory, such as
            ``"24GB"``.
        quantize: of a model by name, the bits of its linear layers, one of `QUANTIZATIONS`; None: as its config says.

    Raises:
        UnsupportedModel: if no adapter covers the model, or no family is called so.
        ConfigError: for sizes that the model can't make, unknown hardware, or a tuned file that can't be read.
    """
    card = None if hardware is None else find_hardware(hardware)
    of = _subject(model, card if card and card.tflops else None, quantize)
    sizes: dict[str, Any] = dict(
        height=height, width=width, num_frames=num_frames, num_inference_steps=num_inference_steps, config=of.config,
        linears=of.linears, kernel_cost=KERNEL_COST if elsewhere(hardware) else None,
    )  # fmt: skip
    dense = estimate(of.adapter, of.family, **sizes)
    few = [FEW] * (dense.num_inference_steps <= MOST)
    presets = [preset_methods(level, of.model) for level in (*LEVELS, *few)]
    made = [_preset_row(preset, of, sizes, dense) for preset in presets]
    rows = [Setting(name=DENSE), *(row for row, _ in made)]
    rows.sort(key=lambda row: -round(row.speedup, 2))  # as it is shown: equal ones stay in the presets' order
    tuned = find_tuned(of.source) if of.source else []
    fitting = [setting for setting in tuned if _fits(setting, dense)]
    rows = [*(_tuned_row(setting) for setting in fitting), *rows]
    seconds = None if card is None else dense.least_seconds(card)
    if seconds is not None:
        rows = [replace(row, seconds=seconds / row.speedup) for row in rows]
    return Recommendation(
        family=of.family.name, height=dense.height, width=dense.width, num_frames=dense.num_frames,
        num_inference_steps=dense.num_inference_steps, tokens=dense.layout.visual_tokens,
        hardware=card.name if card else None, weight_bytes=of.weight_bytes, settings=rows,
        notes=(
            *_notes(of, dense, num_frames, presets[-1]),
            *(_card_notes(of, card) if card else ()),
            *(FEW_NOTE for _ in few),
            PREDICTED_NOTE,
            *dict.fromkeys(measured for _, measured in made if measured),
            *(_elsewhere(setting) for setting in tuned if setting not in fitting),
        ),
    )  # fmt: skip


def _subject(model: Any, card: Hardware | None, quantize: str | None) -> _Subject:
    if isinstance(model, Path) or (isinstance(model, str) and model not in installed.families()):
        if isinstance(model, str) and "/" not in model and not Path(model).is_dir():
            installed.family(model)  # refuses it, with the nearest name
        files = read_model_files(model_source(str(model)))
        adapter, family = files.identify()
        kind = quantize or linears_of_config(files.transformer)
        linears = linears_called(kind, card, origin="" if quantize else "the model's config") if kind else None
        weights = weights_of(family, linears)
        return _Subject(
            adapter=adapter, family=family, config=files.transformer, weight_bytes=weights,
            source=str(model), linears=linears,
        )  # fmt: skip
    if isinstance(model, str):
        adapter, family = installed.described(model)
        linears = linears_called(quantize, card) if quantize else None
        return _Subject(
            adapter=adapter, family=family, config=family.config, weight_bytes=weights_of(family, linears),
            source=family.repo, linears=linears,
        )  # fmt: skip
    if quantize:
        raise ConfigError(f"quantize = {quantize!r} is for a model by its name, got a loaded one; quantise that itself")
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
    """Return the sizes of a model that is no released one, by its config, with its family's defaults."""
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
    return sum(ASSUMED_BYTES * w.numel() if w.is_meta else weight_size(w) for w in transformer.parameters())


def _preset_row(
    preset: PresetMethods, of: _Subject, sizes: Mapping[str, Any], dense: Prediction
) -> tuple[Setting, str]:
    """Return the row of a preset, of the methods that act in a run of this size, and how sparse attention counts."""
    idle = {choice.config.name: _idle(choice, dense, of.family) for choice in preset.chosen}
    acting = {choice.config.name: choice for choice in preset.chosen if idle[choice.config.name] is None}
    prediction = estimate(of.adapter, of.family, preset=replace(preset, chosen=tuple(acting.values())), **sizes)
    promises = {name: preset.promises(dense.num_inference_steps).get(name) for name in acting}
    planned = [name for name, choice in acting.items() if issubclass(handler_of(choice.config), AttentionHandler)]
    needs = [f"{', '.join(planned)}: a GPU with Triton"] if planned else []
    return Setting(
        name=preset.level, methods={name: choice.what for name, choice in acting.items()},
        speedup=prediction.speedup_of_methods,
        losses={name: promise and promise.tenth for name, promise in promises.items() if not acting[name].beyond},
        medians={name: promise.median for name, promise in promises.items() if promise is not None},
        sources={name: choice.source for name, choice in acting.items()}, state_bytes=prediction.state_bytes,
        needs=(*needs, *(why for why in idle.values() if why)),
    ), prediction.cost_measured  # fmt: skip


def _idle(choice: Choice, run: Prediction, family: Family) -> str | None:
    """Return why a method does nothing in a run of these sizes, empty: it is for larger ones alone; None: it acts."""
    config, tokens, steps = choice.config, run.layout.visual_tokens, run.num_inference_steps
    least_steps, least_tokens = (getattr(config, name, None) or 0 for name in ("min_steps", "min_tokens"))
    if least_steps > steps:
        return f"{config.name} waits for {least_steps} steps, here {steps}"
    if least_tokens > tokens:
        return f"{config.name} waits for {least_tokens:,} tokens, here {tokens:,}"
    within = choice.beyond and not handler_of(config).extends & beyond_trained(family, run.layout).keys()
    return "" if within else None


def _fits(tuned: TunedSetting, dense: Prediction) -> bool:
    names = ("height", "width", "num_frames", "num_inference_steps")
    return all(getattr(tuned.measured, name) == getattr(dense, name) for name in names)


def _tuned_row(tuned: TunedSetting) -> Setting:
    measured, name = tuned.measured, tuned.path.stem
    methods = {method.name: ", ".join(f"{k} {v}" for k, v in method.to_dict().items()) for method in tuned.methods}
    run = {"run": ", ".join(f"{name} {value}" for name, value in tuned.run.items())}
    source = (
        f"tuned on this model by dit-accel tune pipeline, {measured.prompts} held-out prompts, {measured.metric} to "
        f"the converged run: {tuned.path}"
    )
    return Setting(
        name=name, methods={**run, **methods}, speedup=measured.speedup, losses={measured.metric: measured.quality},
        sources={name: source}, needs=("generate --config FILE",),
    )  # fmt: skip


def _elsewhere(tuned: TunedSetting) -> str:
    at = tuned.measured
    return (
        f"tuned at another size, {at.width} x {at.height}, {at.num_frames} frames, {at.num_inference_steps} steps: "
        f"{tuned.path}"
    )


def _notes(of: _Subject, dense: Prediction, num_frames: int | None, largest: PresetMethods) -> list[str]:
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
    notes += advice(of.adapter, of.family, dense.layout, largest.configs)
    if dense.linears is not None:
        alone = 1 / (1 - dense.linear_share * (1 - dense.linear_time))
        notes += [*dense.linears.notes, "speed-ups are over the dense run of the model as it is"]
        if alone != 1:
            notes.append(f"with linear layers {dense.linears} that run is {alone:.2f} times as fast as in 16 bits")
    return notes


def _card_notes(of: _Subject, card: Hardware) -> list[str]:
    gib = of.weight_bytes / 2**30
    notes = []
    weights = f"the transformer's weights alone take {gib:.3g} GiB or more"
    if gib > card.gib:
        notes.append(
            f"{weights}, beyond the {card.gib:g} GiB there are: generate with --offload group or sequential, or "
            "--quantize"
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
