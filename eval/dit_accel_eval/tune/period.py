"""Tunes UltraViCo for a model: whether its attention over frames repeats, and after how many.

The mean logit of tokens at one place of two frames d apart is near sum_i a_i cos(f_i d) + C, which repeats where the
frequencies that carry most of it are multiples of one. Source: UltraViCo (arXiv 2511.20123), section on periodic
attention. Where we depart from it: amplitudes are fitted to the curve by least squares, none below 0, and 0 for a
frequency too slow to differ from C; a fundamental has the largest amplitude, others belong to it by a tolerance.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from dit_accel_pipelines.generation.progress import Stages
from dit_accel_pipelines.generation.request import resolve
from scipy.optimize import nnls

from dit_accel import ConfigError, UltraViCo
from dit_accel.adapters.adapter import Adapter
from dit_accel.adapters.installed import adapter_for
from dit_accel.adapters.rotary import rope_of
from dit_accel.attachment.layers import PlannedCall
from dit_accel.rules.ultravico import extended_frames

from ..runs.loaded import TuningRequest
from .base import Tuned, TuningRun, watched_attention, write_config

TOLERANCE = 0.06  # how far a ratio of frequencies may be from a whole number: CogVideoX's 3.16 counts as 3
APART = 0.2  # how far it may be at most, in turns: a share alone would let any ratio above 8 pass
SEPARATE = 4.0
"""A period up to so many longest distances differs from a constant; slower waves would fit any curve alike."""

PERIODIC = 0.5  # share of the amplitude above which a family of frequencies repeats: ours, between Wan and others
BAND = 0.08  # half a band over its period, rounded down: HunyuanVideo's 4 frames of 50, CogVideoX's 1 of 20


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


def tune_period(request: TuningRequest, output: Path, *, stages: Stages | None = None) -> Tuned:
    """Measure a model's attention over frames on every prompt, and write it for ``--config``.

    Clips have twice the trained length if none is given. Found are the latent ``frames``, the ``curve``, the mean logit
    by frame distance, and what that is made of, a `Spectrum`.
    """
    if request.methods:
        raise ConfigError(f"tune period measures the model as it is, got --{request.methods[0].name}; leave it out")
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
    peaks, name = spectrum(curve, frequencies), family.name if family else adapter.name
    rows = [
        (f"{period:.1f}", f"{share:.1%}", "yes" if place in peaks.family else "")
        for place, (period, share) in enumerate(zip(peaks.periods, peaks.amplitudes, strict=True))
    ]
    remarks = [
        f"the family of period {peaks.periods[peaks.dominant]:.1f} holds {peaks.share:.0%} of the amplitude: "
        + ("attention does not repeat, so that no bands are set" if peaks.period is None else "attention repeats"),
        f"fit's error {peaks.error:.0%}",
    ]
    config = UltraViCo(period=peaks.period, gamma=peaks.gamma, trained_frames=family.trained_frames if family else None)
    about = f"{len(curve)} latent frames, {len(request.prompts)} prompts"
    write_config(output, config, [f"Measured by dit-accel tune period on {name}: {about}.", *remarks])
    runs.finish()
    return Tuned(
        found={"model": name, "frames": len(curve), "curve": curve.tolist(), "found": dataclasses.asdict(peaks)},
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Spectrum:
    """What a curve is made of: shares of each amplitude, and the places of the dominant frequency's multiples."""

    periods: tuple[float, ...]
    amplitudes: tuple[float, ...]
    dominant: int
    family: tuple[int, ...]
    share: float
    error: float

    @property
    def period(self) -> float | None:
        """Frames after which attention repeats; None where it does not."""
        return self.periods[self.dominant] if self.share > PERIODIC else None

    @property
    def gamma(self) -> float | None:
        """Half the width of a band, in frames; None without a period."""
        return None if self.period is None else float(max(1, int(BAND * self.period)))


def harmonics(frequencies: np.ndarray, place: int) -> tuple[int, ...]:
    """Return the places of the frequencies that are near whole multiples of one, itself included."""
    ratio = frequencies / frequencies[place]
    whole = np.maximum(np.rint(ratio), 1)
    return tuple(int(i) for i in np.flatnonzero(np.abs(ratio - whole) <= np.minimum(TOLERANCE * whole, APART)))


def spectrum(curve: np.ndarray, frequencies: np.ndarray) -> Spectrum:
    """Return what a curve over frame distances is made of."""
    distance, count = np.arange(len(curve)), len(curve) - np.arange(len(curve))
    waves = np.cos(np.outer(distance, frequencies))
    weight = count / count.sum()
    waves = waves - weight @ waves  # the constant takes the means
    values = curve - weight @ curve
    if np.abs(values).max() <= 1e-12 * np.abs(curve).max():
        values = np.zeros_like(values)  # what is left of a constant is rounding
    seen = 2 * np.pi / frequencies <= SEPARATE * (len(curve) - 1)
    fit = np.zeros(len(frequencies))
    fit[seen] = nnls(waves[:, seen] * np.sqrt(weight)[:, None], values * np.sqrt(weight))[0]
    total, size = float(fit.sum()), float(np.sqrt(weight @ values**2))
    shares = fit / total if total > 0 else fit
    place = int(shares.argmax())
    family = harmonics(frequencies, place)
    left = float(np.sqrt(weight @ (values - waves @ fit) ** 2))
    return Spectrum(
        periods=tuple((2 * np.pi / frequencies).tolist()), amplitudes=tuple(shares.tolist()), dominant=place,
        family=family, share=float(shares[list(family)].sum()), error=left / size if size > 0 else 0.0,
    )  # fmt: skip
