"""Tunes UltraViCo for a model: whether its attention over frames repeats, and after how many.

Measured on the model's own generations, as it is: the mean logit of tokens at one place of two frames, by the frames'
distance, over layers, heads, steps and prompts. Source: UltraViCo (arXiv 2511.20123), section on periodic attention.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dit_accel_pipelines.generation.generate import run
from dit_accel_pipelines.generation.loading import load_pipeline
from dit_accel_pipelines.generation.progress import Stages
from dit_accel_pipelines.generation.request import Request, settle
from torch import Tensor

import dit_accel
from dit_accel import ConfigError, UltraViCo
from dit_accel.adapters.adapter import Adapter, Family
from dit_accel.adapters.installed import adapter_for
from dit_accel.adapters.rotary import rope_of
from dit_accel.files import written_whole
from dit_accel.methods.base import AttentionHandler, Model, Phase
from dit_accel.methods.config import MethodConfig
from dit_accel.plan.call import Call
from dit_accel.plan.context import CallContext
from dit_accel.plan.plan import AttentionPlan
from dit_accel.rules.ultravico import DecayRule, extended_frames

from .base import Progress, Table, Tuned, check_output, left_prompts, run_settings
from .cache_runs import write_config
from .frame_periods import Spectrum, spectrum

ROWS = 64
"""Query rows of a call whose attention is summed by distance."""

SAFE_ALPHA = 0.9


class Watch(MethodConfig):
    """Asks for `Watcher`."""

    name = "watch"


class Watcher(AttentionHandler):
    """Sums up logits and attention by frame distance, and changes nothing.

    Attributes:
        logits: float64 [F, F], mean logit of two frames' tokens at one place, summed over calls.
        masses: float64 [2, F], attention by distance without and with decay, summed over calls.
        calls: how many there were.
    """

    config_type = Watch
    phase = Phase.LISTS

    def __init__(self, config: Watch, model: Model) -> None:
        super().__init__(config, model)
        self.logits: Tensor | None = None
        self.masses: Tensor | None = None
        self.calls = 0

    def plan(self, plan: AttentionPlan, call: Call, context: CallContext) -> AttentionPlan:
        """Measure a call."""
        layout = context.layout
        if layout.frames < 2:
            raise ConfigError(f"tune period needs clips of 2 latent frames or more, got {layout.frames}; show a video")
        scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
        q, k = (x[:, :, layout.visual].float() for x in (call.q, call.k))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        by_frame = [x.unflatten(2, (layout.frames, -1)).flatten(3) for x in (q, k)]
        logits = (by_frame[0] @ by_frame[1].mT).mean((0, 1)) * scale / layout.tokens_per_frame
        masses = self._masses(q, k, scale, layout.frames)
        self.logits = logits.double() if self.logits is None else self.logits + logits
        self.masses = masses if self.masses is None else self.masses + masses
        self.calls += 1
        return plan

    def _masses(self, q: Tensor, k: Tensor, scale: float, frames: int) -> Tensor:
        """Return the attention of some rows by frame distance, without and with decay, float64 [2, F]."""
        size = q.shape[2] // frames
        rows = torch.linspace(0, q.shape[2] - 1, min(ROWS, q.shape[2]), dtype=torch.float64, device=q.device).long()
        logits = q[:, :, rows] @ (k - k.mean(2, keepdim=True)).mT * scale
        keys = torch.arange(q.shape[2], device=q.device) // size
        distance = (rows[:, None] // size - keys).abs()
        trained = self.model.family.trained_frames if self.model.family else None
        table = torch.from_numpy(DecayRule(trained_frames=trained or frames // 2, alpha=SAFE_ALPHA).table(frames))
        t = table.to(q.device)[distance]
        found = []
        for x in (logits, torch.minimum(logits, t * logits)):
            share = x.softmax(-1).mean((0, 1)).double()
            found.append(torch.zeros(frames, dtype=torch.float64, device=q.device).index_add_(
                0, distance.flatten(), share.flatten()
            ) / len(rows))  # fmt: skip
        return torch.stack(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Period(Tuned):
    """What `tune_period` measured and wrote.

    Attributes:
        output: the TOML file.
        picture: the drawn curves.
        model: what was measured.
        frames: latent frames of the clips.
        curve: mean logit by frame distance.
        attention: share of the attention by frame distance, without decay.
        decayed: the same with decay of alpha 0.9.
        found: what the curve is made of.
    """

    output: Path
    picture: Path
    model: str
    frames: int
    curve: tuple[float, ...]
    attention: tuple[float, ...]
    decayed: tuple[float, ...]
    found: Spectrum

    def table(self) -> Table:
        """Return the spectrum: period, share of the amplitude, whether it belongs to the dominant family."""
        found = self.found
        rows = [
            (f"{period:.1f}", f"{share:.1%}", "yes" if place in found.family else "")
            for place, (period, share) in enumerate(zip(found.periods, found.amplitudes, strict=True))
        ]
        verdict = (
            f"the family of period {found.periods[found.dominant]:.1f} holds {found.share:.0%} of the amplitude: "
            + ("attention does not repeat, so that no bands are set" if found.period is None else "attention repeats")
        )
        return ("period in frames", "share", "in the family"), rows, [verdict, f"fit's error {found.error:.0%}"]


def tune_period(request: Request, output: Path, *, stages: Stages | None = None) -> Period:
    """Measure a model's attention over frames on every prompt, write it for ``--config``, and draw it beside.

    Clips have twice the trained length if none is given. Methods, and a model without periods in frames, are refused.
    """
    if request.methods:
        raise ConfigError(
            f"tune period measures the model as it is, got --{request.methods[0].name}; leave the methods out"
        )
    picture = output.with_suffix(".png")
    check_output(output, ".toml", picture)
    settled, family, *_ = settle(request)
    if family is not None and family.trained_frames is not None and request.num_frames is None:
        frames = extended_frames(family.trained_frames, 2, family.vae[0])
        settled, *_ = settle(dataclasses.replace(request, num_frames=frames))
    request = settled
    progress: Progress[dict[str, Any]] = Progress(output, run_settings(request), dict)
    stages = stages or Stages(quiet=True)
    stages.stage("loading")
    pipe = load_pipeline(request)
    adapter, config = adapter_for(type(pipe.transformer).__name__), pipe.transformer.config
    frequencies = _frequencies(adapter, config)
    family = adapter.family(config)
    model = Model(adapter=adapter, family=family, heads=0, layers=0)
    for prompt in left_prompts(request, progress, stages):
        with dit_accel.attach(pipe, preset="none") as attachment:
            watcher = Watcher(Watch(), model)
            attachment._execution.use((watcher,))
            run(pipe, prompt, request, stages=stages)
        assert watcher.logits is not None and watcher.masses is not None  # noqa: PT018
        parts = {"logits": watcher.logits, "masses": watcher.masses}
        progress.add({name: (part / watcher.calls).cpu().tolist() for name, part in parts.items()})
    measured = _period(progress.done, output, picture, model.name if family else adapter.name, frequencies)
    _write(measured, family, len(request.prompts))
    progress.finish()
    return measured


def _frequencies(adapter: Adapter, config: Any) -> np.ndarray:
    rope = rope_of(adapter.name, adapter.rope, config)
    frames = next((axis for axis in rope.axes(config) if axis.name == "frames"), None)
    if frames is None or (rope.kinds is not None and "riflex" not in rope.kinds):
        raise ConfigError(
            f"tune period reads the periods of rotary positions along frames, and {adapter.name} has none"
            f"{': ' + rope.note if frames is not None and rope.note else ''}; set ultravico.period by hand"
        )
    return frames.frequencies()


def _period(done: list[dict[str, Any]], output: Path, picture: Path, model: str, frequencies: np.ndarray) -> Period:
    logits, masses = (np.mean([np.array(part[name]) for part in done], axis=0) for name in ("logits", "masses"))
    both = (logits + logits.T) / 2
    curve = np.array([np.diagonal(both, distance).mean() for distance in range(len(both))])
    plain, decayed = (tuple(map(float, mass)) for mass in masses)
    return Period(
        output=output, picture=picture, model=model, frames=len(curve), curve=tuple(map(float, curve)),
        attention=plain, decayed=decayed, found=spectrum(curve, frequencies),
    )  # fmt: skip


def _write(measured: Period, family: Family | None, prompts: int) -> None:
    found = measured.found
    config = UltraViCo(period=found.period, gamma=found.gamma, trained_frames=family.trained_frames if family else None)
    about = [
        f"Measured by dit-accel tune period on {measured.model}: {measured.frames} latent frames, {prompts} prompts.",
        *measured.table()[2],
    ]
    write_config(measured.output, config, about)
    _draw(measured)


def _draw(measured: Period) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    distance = range(measured.frames)
    upper.plot(distance, measured.curve)
    upper.set_ylabel("mean logit at one place")
    lower.plot(distance, measured.attention, label="as it is")
    lower.plot(distance, measured.decayed, label=f"with decay, alpha {SAFE_ALPHA:g}")
    lower.set(ylabel="share of the attention", xlabel="distance in latent frames", yscale="log")
    lower.legend()
    for multiple in range(1, int(measured.frames / (measured.found.period or np.inf)) + 1):
        for axis in (upper, lower):
            axis.axvline(multiple * (measured.found.period or 0), linestyle=":", color="grey")
    figure.suptitle(f"{measured.model}: attention by distance")
    with written_whole(measured.picture) as temporary:
        figure.savefig(temporary, dpi=110)
