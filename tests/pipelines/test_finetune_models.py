"""`dit-accel finetune` on each pipeline class that it trains, as the pipeline's own call does, and in processes."""

import contextlib
import json
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
import torch.distributed as dist
from dit_accel_pipelines.finetuning.encoded import part_hash
from dit_accel_pipelines.finetuning.experts import component_of, span_of
from dit_accel_pipelines.finetuning.flow import level_within, shifted
from dit_accel_pipelines.finetuning.lora import add_lora
from dit_accel_pipelines.finetuning.models import TRAINABLE
from dit_accel_pipelines.finetuning.recipe import resolve_recipe
from dit_accel_pipelines.finetuning.run import finetune
from dit_accel_pipelines.finetuning.trainable import shift_at
from dit_accel_pipelines.generation.lora import FILE, load_loras
from finetunes import base_folder, processes, recipe, trained, video_folder, weights
from PIL import Image
from some_cases import some
from trainable_folders import CASES, Case, changed_index, pipeline_folder

from dit_accel import ConfigError
from dit_accel.errors import UnsupportedModel

PROMPT = "a red circle moving right"


class Bases(dict[str, Path]):
    """A folder for each model with it, its videos, and what was encoded of them; made when first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __missing__(self, name: str) -> Path:
        case, folder = CASES[name], self.root / name.replace(" ", "-")
        folder.mkdir()
        pipeline_folder(case, folder / "model")
        video_folder(folder / "videos", count=2, frames=-(-case.frames // 4) * 4 + 1, size=case.size)
        self[name] = folder
        return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("models"))


def of(name: str, **changes: Any) -> dict[str, Any]:
    """Changes of the recipe that a model asks for."""
    case = CASES[name]
    return {"num_frames": case.frames, "height": case.size, "width": case.size, **(case.changes or {}), **changes}


def opened(base: Path) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(base / "model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def asked_by_training(trainable: Any, transformer: Any, pipe: Any, *given: Any) -> tuple[dict[str, Any], Any]:
    """The arguments that a velocity calls the transformer with, and what it reads off the output, zeros but one."""
    seen: dict[str, Any] = {}

    def forward(**arguments: Any) -> Any:
        seen.update(arguments)
        return (torch.ones_like(arguments["hidden_states"]),)

    with mock.patch.object(transformer, "forward", forward):
        return seen, trainable.velocity(transformer, pipe, *given)


@pytest.mark.parametrize("name", [name for name in CASES if name != "wan a14b low"])
def test_the_pipelines_own_loop_leads_to_the_clip_by_the_velocity_that_is_trained(bases, name: str):
    """From noise to what the autoencoder makes of a clip, by a transformer without error, asked as in training."""
    case: Case = CASES[name]
    pipe = opened(bases[name])
    trainable, calls = TRAINABLE[type(pipe).__name__], []
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(1, 3, case.frames, case.size, case.size, generator=generator) * 2 - 1
    clip, text = trainable.latents(pipe, video), trainable.text(pipe, PROMPT)
    noise = torch.randn(clip.shape, generator=generator)
    pack = getattr(pipe, "_pack_latents", lambda x: x)
    _, read = asked_by_training(trainable, pipe.transformer, pipe, noise, torch.tensor([0.5]), text)
    sign = read.flatten()[0]
    assert torch.equal(read, sign * torch.ones_like(clip))

    def exact(component: str) -> Any:
        def forward(**arguments: Any) -> Any:
            calls.append((component, arguments))
            return (sign * pack(noise - clip),)

        return forward

    with contextlib.ExitStack() as stack:
        for component in ("transformer", "transformer_2")[: 1 + ("a14b" in name)]:
            stack.enter_context(mock.patch.object(getattr(pipe, component), "forward", exact(component)))
        made = pipe(
            PROMPT, height=case.size, width=case.size, num_frames=case.frames, num_inference_steps=6,
            guidance_scale=1.0, latents=pack(noise), output_type="pt",
        ).frames  # fmt: skip
    with torch.no_grad():
        wanted = pipe.vae.decode(pipe.vae.encode(video).latent_dist.mode()).sample
    wanted = pipe.video_processor.postprocess_video(wanted, output_type="pt")
    assert made.std() > 1e-3
    assert torch.allclose(made, wanted, atol=2e-3)

    # every call: names, shapes and values as training gives them at that place of the way
    ends = [
        asked_by_training(trainable, pipe.transformer, pipe, noise, torch.tensor([level]), text)[0]["timestep"]
        for level in (0.0, 1.0)
    ]
    assert len(calls) == 6
    for component, arguments in calls:
        level = ((arguments["timestep"].float() - ends[0]) / (ends[1] - ends[0])).flatten()[:1]
        noisy = torch.lerp(clip, noise, level)
        ours, _ = asked_by_training(trainable, getattr(pipe, component), pipe, noisy, level, text)
        theirs = {key: value for key, value in arguments.items() if key != "attention_kwargs"}
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if not isinstance(value, torch.Tensor):
                assert ours[key] == value, key
                continue
            assert ours[key].shape == value.shape, key
            assert key == "timestep" or ours[key].dtype == value.dtype, key  # Wan's solver has whole ones
            rounded = 1e-3 * (noise - clip).abs().max() if name.startswith("wan") else 1e-5
            away = rounded if key == "hidden_states" else 1e-3
            assert torch.allclose(ours[key].float(), value.float(), atol=float(away)), key
    if "a14b" in name:
        for expert in ("high", "low"):
            least, most = span_of(pipe, expert)
            levels = [float(told["timestep"]) / 1000 for component, told in calls if component == component_of(expert)]
            assert levels
            assert all(least <= level <= most for level in levels)


def differs(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("name", some(("hunyuan-video", "mochi", "ltx", "wan a14b low"), "hunyuan-video"))
def test_a_lora_is_trained_and_loaded_by_diffusers(bases, tmp_path: Path, name: str):
    """Each layer's update is another after the second step, and the transformer's output another with them."""
    lora = trained(bases[name], tmp_path, **of(name))
    assert len(lora) == CASES[name].modules * 4 * 2
    assert all(bool(value.any()) for value in lora.values())
    assert json.loads((tmp_path / "finetune.json").read_text())["density"] < 1
    pipe = opened(bases[name])
    trainable, low = TRAINABLE[type(pipe).__name__], name == "wan a14b low"
    transformer = pipe.transformer_2 if low else pipe.transformer
    shape = (1, transformer.config.in_channels, 2, 4, 4)
    inputs = torch.randn(shape), torch.tensor([0.5]), trainable.text(pipe, PROMPT)
    with torch.no_grad():
        plain = trainable.velocity(transformer, pipe, *inputs)
        pipe.load_lora_weights(tmp_path, **({"load_into_transformer_2": True} if low else {}))
        assert differs(plain, trainable.velocity(transformer, pipe, *inputs)) > 1e-4
    layers = {module for module, layer in transformer.named_modules() if getattr(layer, "lora_A", None)}
    assert len(layers) == CASES[name].modules * 4
    assert all(bool(layer.lora_B["default_0"].weight.any()) for layer in map(transformer.get_submodule, layers))
    alone = opened(bases[name])
    load_loras(alone, [str(tmp_path)])
    there = alone.transformer_2 if low else alone.transformer
    assert torch.equal(trainable.velocity(there, pipe, *inputs), trainable.velocity(transformer, pipe, *inputs))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name != "wan a14b high"])
def test_a_training_goes_on_exactly_with_blocks_computed_again_and_samples_in_bfloat16(
    bases, tmp_path: Path, name: str
):
    options = of(name, batch_size=2)
    whole = trained(bases[name], tmp_path / "whole", **options)
    trained(bases[name], tmp_path / "parts", **options, steps=1)
    parts = trained(bases[name], tmp_path / "parts", **options, resume=True, gradient_checkpointing=True)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    options = of(name, dtype="bfloat16", sample_every=1, sample_steps=4, ema_decay=0.5)
    lora = trained(bases[name], tmp_path / "half", **options)
    assert all(value.dtype == torch.float32 and torch.isfinite(value).all() for value in lora.values())
    sheets = [(tmp_path / "half" / "samples" / f"step-0000000{step}.png").read_bytes() for step in (1, 2)]
    assert sheets[0] != sheets[1]


BAD = [
    ("ltx", {"num_frames": 29}, r"num_frames.*8 and 1 more.*such as 25, got 29"),
    ("hunyuan-video", {"width": 72}, r"width.*16.*got 72"),
    ("mochi", {"num_frames": 31}, r"29 frames.*31"),
    ("wan a14b low", {"expert": None}, r"two transformers.*--expert"),
    ("mochi", {"expert": "low"}, "one transformer, got expert 'low'"),
]


def test_what_a_model_cannot_make_is_told(bases, tmp_path: Path):
    for name, changes, message in BAD:
        with pytest.raises(ConfigError, match=message):
            finetune(recipe(bases[name], output=tmp_path / "out", **{**of(name), **changes}))
        assert not (tmp_path / "out" / FILE).exists()
    for name in ("ltx", "mochi"):  # before anything is loaded
        with pytest.raises(ConfigError, match=rf"adapter '{name}'.*tokens"):
            resolve_recipe(recipe(bases[name], **of(name, ulysses=2)), 4)
    assert resolve_recipe(recipe(bases["hunyuan-video"], **of("hunyuan-video", ulysses=2)), 4).clips_a_step(4) == 2


def test_what_is_not_trained_is_refused_with_its_reason(bases, tmp_path: Path):
    folder = pipeline_folder(CASES["wan ti2v"], tmp_path / "model")
    changed_index(folder, _class_name="CogVideoXPipeline")
    with pytest.raises(UnsupportedModel, match=r"CogVideoXPipeline, .*predicts v"):
        finetune(recipe(tmp_path, **of("wan ti2v")))
    changed_index(folder, _class_name="WanPipeline", transformer_2=["diffusers", "WanTransformer3DModel"])
    with pytest.raises(ConfigError, match=r"two transformers.*boundary_ratio None"):
        finetune(recipe(tmp_path, **of("wan ti2v", expert="high")))
    pipe = opened(bases["wan ti2v"])
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(UnsupportedModel, match=r"attn1.*fused"):
        add_lora(pipe.transformer, TRAINABLE["WanPipeline"], recipe(bases["wan ti2v"]))


def test_what_was_encoded_is_known_by_all_that_encoded_it(bases):
    one, other = opened(bases["mochi"]), opened(bases["mochi"])
    for name in ("vae", "text_encoder", "tokenizer"):
        assert part_hash(getattr(one, name)) == part_hash(getattr(other, name))
    before = {name: part_hash(getattr(one, name)) for name in ("vae", "text_encoder", "tokenizer")}
    other.vae.register_to_config(scaling_factor=2.0)
    other.tokenizer.add_tokens(["kite"])
    other.text_encoder.encoder.final_layer_norm.weight.data[0] += 1
    assert all(part_hash(getattr(other, name)) != value for name, value in before.items())


def test_the_shift_by_tokens_is_the_schedulers():
    options = dict(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024)
    for kind, tokens in (("exponential", 80), ("exponential", 6000), ("linear", 2000)):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**options, time_shift_type=kind)
        mu = 0.95 + (tokens - 1024) * (2.05 - 0.95) / (4096 - 1024)
        sigmas = torch.linspace(1.0, 0.1, 10)
        scheduler.set_timesteps(sigmas=sigmas.numpy(), mu=mu)
        assert torch.allclose(shifted(sigmas, shift_at(scheduler, tokens)), scheduler.sigmas[:-1], atol=1e-6)


def test_an_expert_has_its_part_of_the_noise_levels():
    def levels(count: int, span: tuple[float, float]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.stack([level_within(generator, 5.0, span) for _ in range(count)])

    whole, places = levels(8000, (0.0, 1.0)), torch.tensor([0.2, 0.5, 0.8])
    for span in ((0.875, 1.0), (0.0, 0.875)):
        drawn, part = levels(4000, span), whole[(whole >= span[0]) & (whole <= span[1])]
        assert span[0] <= drawn.min()
        assert drawn.max() <= span[1]
        assert differs(drawn.quantile(places), part.quantile(places)) < 0.02
    assert levels(9, (0.999999, 1.0)).isfinite().all()  # where hardly any would fall by chance


# Several processes train what one does, tell alike what is wrong, and lose no checkpoint


def in_processes(test):
    return pytest.mark.slow(pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")(test))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, videos, and what was encoded of them."""
    return base_folder(tmp_path_factory.mktemp("finetune"))


def gradients(folder: Path) -> torch.Tensor:
    """What AdamW has seen after its first step, from the checkpoint; its update alone would tell signs."""
    saved = torch.load(folder / "checkpoints" / "step-00000001.pt", weights_only=True)
    return torch.cat([state["exp_avg"].flatten() for state in saved["optimizer"]["state"].values()])


@in_processes
@pytest.mark.parametrize(
    ("many", "ulysses", "name"),
    [(2, 1, None), (2, 2, "hunyuan-video"), (4, 2, None)],
    ids=["clips", "ulysses", "groups"],
)
def test_processes_train_what_one_does(base: Path, tmp_path: Path, many: int, ulysses: int, name: str | None):
    """Each with clips of its own; all with the same; and two groups of two, each with its clips."""
    options: dict[str, Any] = dict(steps=1, learning_rate=1e-3)
    if name is not None:
        case, base = CASES[name], tmp_path
        pipeline_folder(case, base / "model")
        video_folder(base / "videos", frames=case.frames, size=case.size)
        options |= dict(num_frames=case.frames, height=case.size, width=case.size)
    sampled = dict(sample_every=1, sample_steps=1) if many == 4 else {}
    alone = trained(base, tmp_path / "alone", batch_size=2, **options, **sampled)
    rows = 2 * ulysses // many
    errors = processes(
        many, base, output=tmp_path / "many", batch_size=rows, ulysses=ulysses, gradient_checkpointing=ulysses > 1,
        **options, **sampled,
    )  # fmt: skip
    assert errors == [""] * many
    one, other = gradients(tmp_path / "alone"), gradients(tmp_path / "many")
    assert one.abs().max() > 0
    assert (one - other).abs().max() < 1e-4 * one.abs().max()
    loras = alone, weights(tmp_path / "many")
    assert loras[0].keys() == loras[1].keys()
    assert max(float((value - loras[1][key]).abs().max()) for key, value in loras[0].items()) < 1e-5
    records = [json.loads((tmp_path / name / "finetune.json").read_text()) for name in ("alone", "many")]
    assert [record["processes"] for record in records] == [1, many]
    assert records[0]["clips a step"] == records[1]["clips a step"] == 2
    assert records[0]["density"] == records[1]["density"] < 1
    losses = [json.loads((tmp_path / name / "log.jsonl").read_text())["loss"] for name in ("alone", "many")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    if sampled:  # by the first group, while the other waits
        sheets = [
            np.asarray(Image.open(tmp_path / name / "samples" / "step-00000001.png")) for name in ("alone", "many")
        ]
        assert np.abs(sheets[0].astype(int) - sheets[1]).max() <= 2
    if name is None:
        trained(base, tmp_path / "many", batch_size=2, **{**options, "steps": 2}, resume=True)  # in one process


@in_processes
def test_what_is_wrong_is_told_by_every_process(base: Path, tmp_path: Path):
    errors = processes(2, base, output=tmp_path / "out", num_frames=17)
    assert [error.startswith("refused: video") for error in errors] == [True, True], errors
    assert not (tmp_path / "out" / FILE).exists()
    trained(base, tmp_path / "lora", batch_size=2, steps=1)
    errors = processes(2, base, output=tmp_path / "lora", rank=4, resume=True)
    assert [error.startswith("refused: the checkpoint") for error in errors] == [True, True], errors
    errors = processes(3, base, output=tmp_path / "out", ulysses=2)
    message = "ulysses = 2 does not divide the 3 processes"
    assert [message in error for error in errors] == [True] * 3


@in_processes
def test_a_lost_process_is_told_and_its_checkpoint_gone_on_from(base: Path, tmp_path: Path):
    errors = processes(2, base, output=tmp_path / "out", steps=3, checkpoint_every=1, lose=1)
    assert errors[1] == "killed"
    assert "refused: another of the 2 processes that train together ended or no longer answers" in errors[0]
    assert "start all again with --resume" in errors[0]
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000001.pt"]
    trained(base, tmp_path / "out", batch_size=2, steps=3, resume=True)
