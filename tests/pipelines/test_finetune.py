"""`dit-accel finetune`: a LoRA through sparse attention, gone on with exactly, loaded by diffusers; bad input."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from dit_accel_assets import model_path
from dit_accel_pipelines.finetuning.clips import find_clips
from dit_accel_pipelines.finetuning.encoded import Encoded
from dit_accel_pipelines.finetuning.flow import batch_loss, batch_of, order
from dit_accel_pipelines.finetuning.models import TRAINABLE
from dit_accel_pipelines.finetuning.recipe import FineTuning
from dit_accel_pipelines.finetuning.run import finetune
from dit_accel_pipelines.finetuning.trainable import Trainable
from dit_accel_pipelines.generation.lora import FILE, load_loras
from finetunes import RADIAL, base_folder, model_folder, recipe, trained, video_folder
from typer.testing import CliRunner

import dit_accel
from dit_accel import ConfigError, EasyCache, LiteAttention
from dit_accel.cli.app import app
from dit_accel.errors import UnsupportedModel


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, videos, and what was encoded of them."""
    return base_folder(tmp_path_factory.mktemp("finetune"))


@pytest.fixture(scope="module")
def one_step(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training of one step leaves."""
    output = tmp_path_factory.mktemp("one-step") / "out"
    trained(base, output, steps=1)
    return output


GIVEN = dict(
    hidden_states=torch.randn(1, 12, 5, 8, 8, generator=torch.Generator().manual_seed(0)),
    timestep=torch.tensor([500.0]), encoder_hidden_states=torch.zeros(1, 4, 96), return_dict=False,
)  # fmt: skip


def opened(base: Path) -> WanPipeline:
    return WanPipeline.from_pretrained(base / "model", dtype=torch.float32)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_training_that_was_stopped_goes_on_exactly(base: Path, tmp_path: Path):
    whole = trained(base, tmp_path / "whole", steps=4, checkpoint_every=2, keep_checkpoints=9)
    trained(base, tmp_path / "parts", steps=2)
    (tmp_path / "parts" / FILE).unlink()
    with (tmp_path / "parts" / "log.jsonl").open("a") as log:
        log.write('{"step": 3, "loss": 9.0}\n{"step": 4')  # written after the checkpoint, and cut off
    assert same(whole, trained(base, tmp_path / "parts", steps=4, resume=True))
    assert sorted(path.name for path in (tmp_path / "whole" / "checkpoints").iterdir()) == [
        "step-00000002.pt", "step-00000004.pt",
    ]  # fmt: skip
    lines = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").open()] for name in ("whole", "parts")]
    assert [line["step"] for line in lines[1]] == [2, 4]
    assert lines[0][-1]["gradient_norm"] == lines[1][-1]["gradient_norm"]


@pytest.mark.slow
def test_batches_in_parts_give_the_same(base: Path, tmp_path: Path):
    plain = trained(base, tmp_path / "plain", batch_size=2)
    parts = trained(base, tmp_path / "parts", accumulate=2)
    assert all((plain[name] - parts[name]).abs().max() < 1e-4 for name in plain)
    assert not same(plain, trained(base, tmp_path / "dense", batch_size=2, methods=()))
    records = [json.loads((tmp_path / name / "finetune.json").read_text()) for name in ("plain", "dense")]
    assert 0.3 < records[0]["density"] < 0.9
    assert (records[0]["clips a step"], records[1]["density"]) == (2, 1.0)


def test_diffusers_loads_what_the_averages_hold(base: Path, tmp_path: Path):
    lora = trained(base, tmp_path / "lora", alpha=6.0, ema_decay=0.5)
    assert len(lora) == 3 * 4 * 2  # blocks, projections, matrices
    assert {name.split(".")[3] for name in lora} == {"attn1"}
    assert all(value.dtype == torch.float32 for value in lora.values())
    pipe = opened(base)
    with torch.no_grad():
        plain = pipe.transformer(**GIVEN)[0]
        pipe.load_lora_weights(tmp_path / "lora")
        module = pipe.transformer.blocks[1].attn1.to_q
        assert module.scaling == {"default_0": 3.0}
        assert not torch.equal(plain, pipe.transformer(**GIVEN)[0])
    average = lora["transformer.blocks.1.attn1.to_q.lora_B.weight"]
    assert torch.equal(module.lora_B["default_0"].weight, average)
    saved = torch.load(sorted((tmp_path / "lora" / "checkpoints").iterdir())[-1], weights_only=True)
    name = "blocks.1.attn1.to_q.lora_B.default.weight"
    assert not torch.equal(saved["weights"][name], average)
    assert torch.equal(saved["averages"]["shadow_params"][list(saved["weights"]).index(name)], average)


@pytest.mark.slow
def test_training_brings_the_loss_down(base: Path, tmp_path: Path):
    trained(base, tmp_path / "long", steps=60, batch_size=3, rank=8, learning_rate=3e-3, caption_dropout=0.0)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "long" / "log.jsonl").open()]
    assert losses[-1] < 0.97 * losses[0]


def test_the_command_and_its_lora_in_generate(tmp_path: Path):
    arguments = ["finetune", "--drawn", "2", "--num-frames", "5", "--steps", "2", "--rank", "2", "--radial"]
    arguments += ["--learning-rate", "0.5", "--sample-every", "2", "--sample-steps", "1", "--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "lora")])
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'lora' / FILE}\n"
    assert "s a step, attention's density" in result.stderr
    assert (tmp_path / "lora" / "samples" / "step-00000002.png").stat().st_size > 1000
    short = ["a red circle", "--num-inference-steps", "1", "--num-frames", "5", "--device", "cpu"]
    files = {}
    for name, more in (("plain", ()), ("lora", ("--lora", str(tmp_path / "lora")))):
        result = CliRunner().invoke(app, ["generate", *short, *more, "-o", str(tmp_path / f"{name}.png")])
        assert result.exit_code == 0, result.stderr
        files[name] = (tmp_path / f"{name}.png").read_bytes()
    assert files["plain"] != files["lora"]
    assert json.loads((tmp_path / "lora.png.json").read_text())["lora"] == [str(tmp_path / "lora")]
    again = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "lora")])
    assert again.exit_code == 2
    assert "of an earlier training; go on with --resume, or choose another folder" in again.stderr


def test_bfloat16_trains_a_lora_of_float32_and_a_tracker_is_fed(base: Path, tmp_path: Path):
    pytest.importorskip("tensorboard")
    lora = trained(base, tmp_path, steps=1, dtype="bfloat16", report_to="tensorboard")
    assert all(value.dtype == torch.float32 and torch.isfinite(value).all() for value in lora.values())
    assert json.loads((tmp_path / "finetune.json").read_text())["dtype"] == "bfloat16"
    assert any(b"loss" in path.read_bytes() for path in tmp_path.rglob("*tfevents*"))


def test_clips_and_captions_are_encoded_once(base: Path, tmp_path: Path, monkeypatch):
    options: dict[str, Any] = dict(cache=tmp_path / "cache", steps=1)
    trained(base, tmp_path / "one", **options)
    before = {path.name: path.stat().st_mtime_ns for path in options["cache"].iterdir()}
    assert len(before) == 3 + 4  # clips; their captions and none
    plain = TRAINABLE["WanPipeline"]
    only = Trainable(latents=lambda *_: 1 / 0, text=lambda *_: 1 / 0, velocity=plain.velocity)
    with monkeypatch.context() as patched:
        patched.setitem(TRAINABLE, "WanPipeline", only)
        trained(base, tmp_path / "two", **options)
    trained(base, tmp_path / "three", num_frames=5, **options)
    files = {path.name: path.stat().st_mtime_ns for path in options["cache"].iterdir()}
    assert files.items() >= before.items()
    assert len(files) == 7 + 3


def test_a_place_of_the_training_tells_clip_noise_and_level(base: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(Encoded, "latents", lambda self, place: torch.full((2, 3, 4, 4), float(place)))
    monkeypatch.setattr(Encoded, "text", lambda self, place: {"prompt_embeds": torch.full((5, 6), float(place))})
    monkeypatch.setattr(Encoded, "no_caption", lambda self: {"prompt_embeds": torch.full((5, 6), -1.0)})
    encoded, options = Encoded(tmp_path, list("abcd"), list("abcd"), "e"), recipe(base, caption_dropout=0.25)
    assert all(sorted(order(0, 4, 4 * turn + place) for place in range(4)) == [0, 1, 2, 3] for turn in range(5))
    both, later = batch_of([5, 6], encoded, options, 3.0), batch_of([6], encoded, options, 3.0)
    assert torch.equal(both.noise[1], later.noise[0])
    assert torch.equal(both.latents[1], later.latents[0])
    assert not torch.equal(both.noise[0], both.noise[1])
    many = batch_of(range(400), encoded, options, 3.0)
    text = many.text["prompt_embeds"][:, 0, 0]
    dropped = (text == -1).float().mean()
    assert 0.15 < dropped < 0.35
    assert torch.equal(text[text >= 0], many.latents[text >= 0][:, 0, 0, 0, 0])
    assert 0.7 < many.levels.median() < 0.8  # one half, shifted by 3: .75
    again = batch_of(range(400), encoded, recipe(base, seed=1), 3.0)
    assert not torch.equal(again.noise, many.noise)


def test_the_loss_is_that_of_the_schedulers_velocity(monkeypatch, base: Path, tmp_path: Path):
    """One whole Euler step by a velocity without error leads from the mixed latents to the clip."""
    monkeypatch.setattr(Encoded, "latents", lambda self, place: torch.randn(2, 3, 4, 4, generator=torch.Generator()))
    monkeypatch.setattr(Encoded, "text", lambda self, place: {"prompt_embeds": torch.zeros(5, 6)})
    batch = batch_of([7], Encoded(tmp_path, ["a"], ["a"], "b"), recipe(base, caption_dropout=0.0), 2.0)
    seen = {}

    def velocity(transformer, pipe, noisy, levels, text):
        seen.update(noisy=noisy, levels=levels)
        return batch.noise - batch.latents + 2.0

    trainable = Trainable(latents=velocity, text=velocity, velocity=velocity)
    assert float(batch_loss(None, None, trainable, batch, torch.device("cpu"), torch.float32)) == pytest.approx(4.0)
    level = float(seen["levels"])
    assert torch.allclose(seen["noisy"] - level * (batch.noise - batch.latents), batch.latents, atol=1e-5)


def test_videos_are_listed_by_metadata_too(base: Path, tmp_path: Path):
    for number in range(2):
        (tmp_path / f"{number}.mp4").write_bytes((base / "videos" / f"{number}.mp4").read_bytes())
    listed = tmp_path / "metadata.jsonl"
    listed.write_text(
        '{"file_name": "1.mp4", "text": "a  kite\\nflies"}\n\n{"file_name": "0.mp4", "caption": "a sea"}\n'
    )
    clips, notes = find_clips(recipe(base, data=tmp_path, num_frames=5))
    assert [(clip.path.name, clip.caption) for clip in clips] == [("1.mp4", "a kite flies"), ("0.mp4", "a sea")]
    assert notes == ["2 of 2 clips are longer than 5 frames; their first ones are taken"]
    assert clips[0].read(5).shape == (5, 32, 32, 3)
    assert np.array_equal(clips[0].read(9)[:5], clips[0].read(5))
    for line, message in (
        ("{", r"jsonl, line 1 .*JSON"),
        ('{"file_name": "1.mp4"}', r"line 1 .*lacks.*caption"),
        ('{"file_name": "9.mp4", "text": "a"}', r"names 9.mp4"),
        ('{"file_name": "1.mp4", "text": " "}', "empty caption"),
    ):
        listed.write_text(line + "\n")
        with pytest.raises(ConfigError, match=message):
            find_clips(recipe(base, data=tmp_path))


UNFIT = [
    ({"data": "none"}, r"none.*no folder"),
    ({"data": "empty"}, "empty.*no video"),
    ({"data": "speechless"}, r"no caption.*0.txt"),
    ({"data": "broken"}, r"0.mp4.*read"),
    ({"height": 48}, r"32 x 32 pixels.*32 x 48"),
    ({"num_frames": 17}, r"9 frames.*17"),
    ({"num_frames": 8}, r"num_frames.*2 and 1 more.*such as 9, got 8"),
    ({"height": 40}, r"height.*16 .*got 40"),
    ({"num_frames": 1001}, "positions"),
    ({"ulysses": 2}, r"ulysses = 2 .*processes, got 1"),
    ({"report_to": "tensorbord"}, r"tracker 'tensorbord'.*'tensorboard'"),
    ({"report_to": "dvclive"}, r"tracker 'dvclive'.*install dvclive"),
    ({"resume": True}, r"--resume.*no checkpoint"),
    ({"methods": (LiteAttention(block_size=16),)}, r"lite.*training"),
]


@pytest.mark.parametrize(("changes", "message"), UNFIT, ids=lambda value: str(value)[:40])
def test_bad_input_is_told_before_anything_is_trained(base: Path, tmp_path: Path, changes, message):
    for name in ("empty", "speechless", "broken"):
        (tmp_path / name).mkdir()
    for name in ("speechless", "broken"):
        (tmp_path / name / "0.mp4").write_bytes(b"nothing of a video")
    (tmp_path / "broken" / "0.txt").write_text("a kite")
    if "data" in changes:
        changes = {"data": tmp_path / changes["data"]}
    with pytest.raises(ConfigError, match=message):
        finetune(recipe(base, output=tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


DRAWN = [
    (["--num-frames", "7"], "wan-tiny: frames=7: a clip has 4k+1 frames; use 5"),
    (["--model", "wan-plain", "--width", "96"], "wan-plain: clips of this world have 64 x 64 pixels, got 96 x 64"),
    (["--model", "{base}/model", "--height", "32", "--width", "32"],
     "drawn for embedded models alone, got model {base}/model; give --data FOLDER"),
]  # fmt: skip


def test_what_can_not_be_drawn_is_told(base: Path, tmp_path: Path):
    for arguments, message in DRAWN:
        words = [word.format(base=base) for word in ("--num-frames", "5", *arguments)]
        result = CliRunner().invoke(app, ["finetune", "--drawn", "2", *words, "-o", str(tmp_path / "lora")])
        assert result.exit_code == 2
        assert message.format(base=base) in " ".join(result.stderr.split())
        assert not (tmp_path / "lora").exists()


BAD = [
    ({"data": None}, r"videos.*drawn clips, got neither"),
    ({"drawn": 3}, r"videos.*drawn clips, got both"),
    ({"data": None, "drawn": 0}, r"drawn.*1 to 1,000,000, got 0"),
    ({"rank": 0}, r"rank.*1 to 10,000, got 0"),
    ({"steps": 0}, r"steps.*1 or more, got 0"),
    ({"weight_decay": float("inf")}, r"weight_decay.*0 or more, got inf"),
    ({"learning_rate": 0.0}, r"learning_rate.*above 0, got 0"),
    ({"caption_dropout": 1.0}, r"caption_dropout.*0 to below 1, got 1"),
    ({"dtype": "float16"}, "dtype 'float16'"),
    ({"expert": "highest"}, "expert 'highest'.*'high'"),
    ({"methods": (EasyCache(),)}, r"easycache.*forward.*training"),
]


def test_values_out_of_range_and_other_pipelines_are_refused(tmp_path: Path):
    for changes, message in BAD:
        with pytest.raises(ConfigError, match=message):
            recipe(tmp_path, **changes)
    with pytest.raises(UnsupportedModel, match=r"FluxPipeline.*trains WanPipeline"):
        finetune(FineTuning(data=tmp_path, output=tmp_path / "out", model="flux-tiny", num_frames=1))
    assert not (tmp_path / "out").exists()


OTHERS = [
    ({"rank": 4}, "rank: 2 there, 4 requested; "),
    ({"methods": (), "batch_size": 2}, r"methods: \{'radial'"),
    ({"model": "other"}, "model's weights: "),
    ({"data": "fewer"}, "captions: "),
]


@pytest.mark.parametrize(("changes", "message"), OTHERS, ids=lambda value: str(value)[:40])
def test_a_checkpoint_of_another_training_is_refused_and_kept(base, one_step, tmp_path, changes, message):
    if "model" in changes:
        changes = {"model": str(model_folder(tmp_path / "other", seed=1))}
    if "data" in changes:
        changes = {"data": video_folder(tmp_path / "fewer", count=2)}
    before = {path: path.read_bytes() for path in one_step.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=message):
        finetune(recipe(base, output=one_step, steps=3, resume=True, **changes))
    assert {path: path.read_bytes() for path in one_step.rglob("*") if path.is_file()} == before


def test_a_training_that_was_stopped_before_its_checkpoint_begins_anew(base: Path, tmp_path: Path):
    output = tmp_path / "out"
    (output / "checkpoints").mkdir(parents=True)
    (output / "log.jsonl").write_text('{"step": 10, "loss": 9.0}\n')
    trained(base, output, steps=1)
    assert [json.loads(line)["step"] for line in (output / "log.jsonl").open()] == [1]
    (checkpoint,) = (output / "checkpoints").iterdir()
    checkpoint.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"checkpoint .*step-00000001\.pt.*delete"):
        finetune(recipe(base, output=output, steps=2, resume=True))
    checkpoint.unlink()
    with pytest.raises(ConfigError, match=r"holds pytorch_lora_weights.safetensors"):
        finetune(recipe(base, output=output))


def test_a_lora_that_does_not_fit_is_refused(one_step: Path):
    pipe = WanPipeline.from_pretrained(model_path("wan-plain"), dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"LoRA .*WanPipeline: .*size mismatch"):
        load_loras(pipe, [str(one_step)])


def test_the_gradient_is_that_of_the_attached_methods(base: Path):
    """Of queries, keys, values and output, against the dense gradient under the same tiles as a mask."""
    transformer = opened(base).transformer.train()
    wanted = [transformer.blocks[2].attn1.to_k.weight, transformer.blocks[1].attn1.to_q.weight]

    def gradients(*methods: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        with dit_accel.attach(transformer, *methods, preset="none", **options):
            return torch.autograd.grad(transformer(**GIVEN)[0].square().mean(), wanted)

    exact, dense = gradients(RADIAL, backend="reference"), gradients()
    torch.testing.assert_close(gradients(RADIAL), exact, rtol=1e-5, atol=1e-6)
    assert not any(torch.allclose(one, other, atol=1e-6) for one, other in zip(exact, dense, strict=True))
