"""Tunes UltraViCo for a model: whether its attention over frames repeats, and after how many.

Measured on the model's own generations, as it is: the mean logit of tokens at one place of two frames, by the frames'
distance, over layers, heads, steps and prompts; `frame_periods` says what it is made of.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from dit_accel_pipelines.generation.progress import Stages
from dit_accel_pipelines.generation.request import Request, resolve

from dit_accel import ConfigError, UltraViCo
from dit_accel.adapters.adapter import Adapter
from dit_accel.adapters.installed import adapter_for
from dit_accel.adapters.rotary import rope_of
from dit_accel.attachment.layers import PlannedCall
from dit_accel.rules.ultravico import extended_frames

from .base import Tuned, TuningRun, watched_attention, write_config
from .frame_periods import spectrum


class Logits:
    """Sums up logits by frame distance."""

    def __init__(self) -> None:
        self.total: Any = 0
        self.calls = 0

    def add(self, planned: PlannedCall) -> None:
        """Measure a call."""
        call, layout = planned.call, planned.context.layout
        if layout.frames < 2:
            raise ConfigError(f"tune period needs clips of 2 latent frames or more, got {layout.frames}; show a video")
        scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
        q, k = (x[:, :, layout.visual].float() for x in (call.q, call.k))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        by_frame = [x.unflatten(2, (layout.frames, -1)).flatten(3) for x in (q, k)]
        logits = (by_frame[0] @ by_frame[1].mT).mean((0, 1)) * scale / layout.tokens_per_frame
        self.total = self.total + logits.double()
        self.calls += 1


def tune_period(request: Request, output: Path, *, stages: Stages | None = None) -> Tuned:
    """Measure a model's attention over frames on every prompt, and write it for ``--config``.

    Clips have twice the trained length if none is given. Methods, and a model without periods in frames, are refused.
    Found are the latent ``frames`` of the clips, the ``curve``, the mean logit by frame distance, and what that is made
    of, a `Spectrum`.
    """
    if request.methods:
        raise ConfigError(
            f"tune period measures the model as it is, got --{request.methods[0].name}; leave the methods out"
        )
    family = resolve(request)[1]
    if family is not None and family.trained_frames is not None and request.num_frames is None:
        frames = extended_frames(family.trained_frames, 2, family.vae[0])
        request = dataclasses.replace(request, num_frames=frames)
    runs = TuningRun(request, output, ".toml", stages)
    transformer = runs.pipe.transformer
    adapter = adapter_for(type(transformer).__name__)
    frequencies = _frequencies(adapter, transformer.config)
    family = adapter.family(transformer.config)
    with runs.attached() as attachment:

        def measured(prompt: str) -> list[list[float]]:
            logits = Logits()
            with watched_attention(attachment, logits.add):
                runs.run(prompt)
            return (logits.total / logits.calls).tolist()

        mean = np.mean(runs.over_prompts(measured), axis=0)
    both = (mean + mean.T) / 2
    curve = np.array([np.diagonal(both, distance).mean() for distance in range(len(both))])
    found, name = spectrum(curve, frequencies), family.name if family else adapter.name
    rows = [
        (f"{period:.1f}", f"{share:.1%}", "yes" if place in found.family else "")
        for place, (period, share) in enumerate(zip(found.periods, found.amplitudes, strict=True))
    ]
    remarks = [
        f"the family of period {found.periods[found.dominant]:.1f} holds {found.share:.0%} of the amplitude: "
        + ("attention does not repeat, so that no bands are set" if found.period is None else "attention repeats"),
        f"fit's error {found.error:.0%}",
    ]
    config = UltraViCo(period=found.period, gamma=found.gamma, trained_frames=family.trained_frames if family else None)
    about = f"{len(curve)} latent frames, {len(request.prompts)} prompts"
    write_config(output, config, [f"Measured by dit-accel tune period on {name}: {about}.", *remarks])
    runs.finish()
    return Tuned(
        output=output,
        found={"model": name, "frames": len(curve), "curve": curve.tolist(), "found": dataclasses.asdict(found)},
        columns=("period in frames", "share", "in the family"),
        rows=rows,
        remarks=remarks,
    )


def _frequencies(adapter: Adapter, config: Any) -> np.ndarray:
    rope = rope_of(adapter.name, adapter.rope, config)
    frames = next((axis for axis in rope.axes(config) if axis.name == "frames"), None)
    if frames is None or (rope.kinds is not None and "riflex" not in rope.kinds):
        raise ConfigError(
            f"tune period reads the periods of rotary positions along frames, and {adapter.name} has none"
            f"{': ' + rope.note if frames is not None and rope.note else ''}; set ultravico.period by hand"
        )
    return frames.frequencies()
