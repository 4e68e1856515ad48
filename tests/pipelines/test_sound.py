"""Sound and frame rates: what models that make sound give is written with the frames, at the rate that they knew."""

import dataclasses
import json
import re
import subprocess
import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import dit_accel_pipelines.generation.generate as generating
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from dit_accel_pipelines.generation import media, sound
from dit_accel_pipelines.generation.pipeline_call import CallSignature
from dit_accel_pipelines.generation.rates import rate_arguments, with_rate
from dit_accel_pipelines.generation.request import Request
from tiny_parts import answering, assemble, build
from tiny_stock import PIPELINES

from dit_accel.errors import ConfigError

VOICE = dict(
    in_channels=16,
    hidden_channels=32,
    upsample_kernel_sizes=[20, 16],
    upsample_factors=[10, 8],
    resnet_kernel_sizes=[3],
    resnet_dilations=[[1, 3]],
    output_sampling_rate=8000,
)
TOKENS = dict(
    vocoder_input_dim=5, dec_dim=4, dec_c_mults=(1, 2), dec_strides=(4, 8), encoder_enabled=False, sampling_rate=800
)
TEXT = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
SHORT = dict(height=32, width=64, num_frames=9, num_inference_steps=2)


def ltx2(folder: Path, monkeypatch) -> None:
    """A folder of LTX-2's configs, for which a tiny pipeline of its class is loaded."""
    kit = PIPELINES["LTX2Pipeline"].kit()
    pipe, call = assemble(diffusers.LTX2Pipeline, kit.but(vocoder=build(LTX2Vocoder, VOICE)))
    answering("encode_prompt", lambda *_, **__: tuple(call[name] for name in TEXT))(pipe)
    index = {"_class_name": "LTX2Pipeline"}
    for name in ("transformer", "vae"):
        part = getattr(pipe, name)
        part.save_config(folder / name)
        index[name] = ["diffusers", type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    monkeypatch.setattr(generating, "load_pipeline", lambda request: pipe)


def request(folder: Path, name: str = "a.mp4", **changes: Any) -> Request:
    return Request(prompt="a", output=folder / name, model=str(folder / "m"), **{**SHORT, **changes})


def heard(path: Path, rate: int) -> np.ndarray:
    """The samples that a player gets of a file's sound, [T, channels]."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-f", "f32le", "-ar", str(rate), "-"]
    return np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, np.float32).reshape(-1, 2)


def test_the_sound_of_ltx2_is_in_the_file_at_the_rate_that_the_model_was_told(tmp_path: Path, monkeypatch):
    ltx2(tmp_path / "m", monkeypatch)
    notes: list[str] = []
    stages = SimpleNamespace(note=notes.append, warn=notes.append, stage=lambda *_: None, advance=lambda: None, quiet=1)
    stages.outputs = stages.output_made = lambda _: None
    made = {}
    for name, fps in (("b.webm", 12), ("frames", 12), ("c.gif", None)):
        (written,) = generating.generate([request(tmp_path, name, fps=fps)], stages=stages)
        made[name] = written.record
    assert [record["fps"] for record in made.values()] == [12, 12, 24]
    seconds = [record["sound"]["seconds"] for record in made.values()]
    assert seconds == pytest.approx([9 / 12, 9 / 12, 9 / 24], abs=0.05)  # a latent of sound lasts 0.04 s
    with wave.open(str(tmp_path / "frames" / "sound.wav")) as file:
        assert (file.getframerate(), file.getnchannels()) == (8000, 2)
        written = np.frombuffer(file.readframes(file.getnframes()), np.int16).reshape(-1, 2) / 32767
    assert len(written) == seconds[0] * 8000
    assert np.corrcoef(heard(tmp_path / "b.webm", 8000)[: len(written), 0], written[:, 0])[0, 1] > 0.7
    assert len(list((tmp_path / "frames").glob("*.png"))) == made["frames"]["num_frames"]
    assert [note for note in notes if "sound" in note] == [
        "LTX2Pipeline makes sound, which .gif can't hold; .mp4, .webm and a folder of frames can"
    ]


OTHERS = [
    ("Kandinsky6TI2VAPipeline", {}, {}, 44_100, 1),
    ("Cosmos3OmniPipeline", dict(sound_tokenizer=("Cosmos3AVAEAudioTokenizer", TOKENS)), {"enable_sound": 1}, 800, 2),
]


@pytest.mark.parametrize(("name", "parts", "changes", "rate", "channels"), OTHERS)
def test_other_pipelines_give_their_sound(name: str, parts: Any, changes: Any, rate: int, channels: int):
    built = {part: build(*config) for part, config in parts.items()}
    pipe, call = assemble(getattr(diffusers, name), PIPELINES[name].kit().but(**built))
    call |= {"output_type": "np", "num_inference_steps": 1, **changes}
    heard_of = sound.sound_of(pipe(**call, generator=torch.Generator().manual_seed(0)), pipe)
    assert heard_of is not None
    assert (heard_of.rate, heard_of.samples.shape[1]) == (rate, channels)
    assert heard_of.samples.std() > 0


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_a_tone_is_heard_beside_its_frames(tmp_path: Path, suffix: str):
    time = np.arange(12_000) / 24_000
    tone = sound.Sound(np.stack([np.sin(2 * np.pi * 440 * time), np.zeros_like(time)], 1).astype(np.float32), 24_000)
    frames = np.random.default_rng(0).integers(0, 255, (6, 48, 64, 3), np.uint8)
    media.write_media(tmp_path / f"a{suffix}", frames, fps=12, sound=tone)
    left, right = heard(tmp_path / f"a{suffix}", 24_000)[: len(time)].T
    assert np.abs(np.fft.rfft(left)).argmax() == pytest.approx(440 * len(left) / 24_000, abs=1)
    assert (np.abs(left).max(), np.abs(right).max()) == (pytest.approx(1, abs=0.1), pytest.approx(0, abs=0.02))
    reader = imageio_ffmpeg.read_frames(str(tmp_path / f"a{suffix}"))
    assert (next(reader)["fps"], len(list(reader))) == (12, 6)


RATES = [
    ("LTXPipeline", None, {"frame_rate": 25}, 25),
    ("LTX2Pipeline", 23.976, {"frame_rate": 23.976}, 23.976),
    ("Cosmos2VideoToWorldPipeline", 24.0, {"fps": 24}, 24),
    ("Kandinsky6TI2VAPipeline", None, {"frame_rate": 24.0}, 24),
    ("WanPipeline", None, {}, 16),
    ("HunyuanVideoPipeline", None, {}, 24),
    ("HunyuanVideoFramepackPipeline", None, {}, 30),
    ("WanPipeline", 24.0, {}, r"frame rate.* 24 a second"),
    ("FluxPipeline", 24.0, {}, 24),
    ("LTXPipeline", 23.976, ConfigError, r"whole frame_rate, got fps 23.976; use 24"),
    ("SkyReelsV2DiffusionForcingPipeline", 30.0, ConfigError, r"knows 16 and 24 .*got fps 30"),
]


@pytest.mark.parametrize(("name", "fps", "passed", "said"), RATES)
def test_a_rate_reaches_the_model_where_its_call_takes_one(name: str, fps: float | None, passed: Any, said: Any):
    call, asked = CallSignature.of(getattr(diffusers, name)), Request(prompt="a", output=Path("a.png"), model="a/b")
    asked = dataclasses.replace(asked, fps=fps)
    if passed is ConfigError:
        with pytest.raises(ConfigError, match=said):
            with_rate(asked, call)
        return
    asked, notes = with_rate(asked, call)
    found = rate_arguments(asked, call)
    assert (found, [type(value) for value in found.values()]) == (passed, [type(value) for value in passed.values()])
    if isinstance(said, str):
        (note,) = notes
        assert re.search(said, note)
    else:
        assert (asked.output_fps, notes) == (said, [])
