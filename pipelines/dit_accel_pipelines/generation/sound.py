"""The sound that a pipeline makes beside its pictures, as samples and as a .wav file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel.errors import ConfigError

from .pipeline_call import CallSignature

SAMPLE_RATES = (("", "audio_sample_rate"), ("vocoder", "output_sampling_rate"), ("sound_tokenizer", "sampling_rate"))
"""Where pipelines say the samples a second: a component, "" for the pipeline itself, and the name in its config."""


@dataclass(frozen=True, slots=True)
class Sound:
    """One output's sound."""

    samples: np.ndarray  # float32 [T, channels] in [-1, 1]
    rate: int  # samples a second

    def to_dict(self) -> dict[str, float]:
        """Return what a side-car says of it."""
        count, channels = self.samples.shape
        return {"seconds": count / self.rate, "channels": channels, "sampling_rate": self.rate}


def lost_sound(output: Path, call: CallSignature) -> list[str]:
    """Return a note where a pipeline makes sound, as those do that may start from its noise, and a file holds none."""
    if not call.takes("audio_latents") or output.suffix.lower() not in (".gif", ".png"):
        return []
    return [f"{call.name} makes sound, which {output.suffix} can't hold; .mp4, .webm and a folder of frames can"]


def sound_of(output: Any, pipe: Any) -> Sound | None:
    """Return the sound of a pipeline's output, of a batch the first; None where it made none.

    ``output``: has ``audio`` [B, channels, T] or [B, T], as LTX-2's and Kandinsky 6's, or ``sound`` [channels, T], as
    Cosmos 3's; a tensor or array in [-1, 1].
    """
    audio, sound = (getattr(output, name, None) for name in ("audio", "sound"))
    wave = sound if audio is None else audio[0]
    if wave is None:
        return None
    wave = wave.detach().float().cpu().numpy() if hasattr(wave, "detach") else np.asarray(wave)
    samples = np.clip(np.atleast_2d(wave).T, -1.0, 1.0).astype(np.float32)
    if not np.isfinite(samples).all():
        raise ConfigError("the model made sound of values that are no numbers; take another --dtype, such as float32")
    for component, name in SAMPLE_RATES:
        owner = getattr(getattr(pipe, component, None), "config", None) if component else pipe
        rate = getattr(owner, name, None)
        if rate:
            return Sound(samples, int(rate))
    raise ConfigError(f"{type(pipe).__name__} made sound and does not say its samples a second; call it from Python")


def write_wav(path: Path, sound: Sound) -> None:
    """Write sound as 16-bit PCM."""
    from scipy.io import wavfile

    wavfile.write(path, sound.rate, (sound.samples * 32767).round().astype(np.int16))
