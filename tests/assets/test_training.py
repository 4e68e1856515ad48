"""The training scripts: they resume bit for bit, refuse another recipe, and measure attention's mass rightly."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "assets" / "training"))

import accept
import concentration
import distill
import export
import export_lora
import loop
import numpy as np
import pool
import reading
import samples
import subjects
import train_image
import train_transformer
import train_vae
import training_ranks
from dit_accel_assets import catalog, load, loading, painter, world
from parallel_ranks import processes
from training_ranks import Steps

VAE = train_vae.VaeTraining(steps=6, freeze_encoder_at=4, stages=((1.0, ((1.0, 1, 32, 32, 1),)),))
TRANSFORMER = train_transformer.TransformerTraining(
    steps=4,
    pools=((32, 32, 1, 4), (32, 32, 17, 4)),
    stages=((1, ((1.0, 32, 32, 1, 2),)), (4, ((1.0, 32, 32, 17, 2),))),
    warmup=1,
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(train_vae, "latent_statistics", lambda vae: ([0.5] * 12, [2.0] * 12))
    monkeypatch.setattr(train_vae, "held_out_psnr", lambda *args: [0.0])
    monkeypatch.setattr(pool, "SHARD", 2)
    # two blocks resume as twelve do
    monkeypatch.setitem(train_transformer.build_pipeline.__globals__["TRANSFORMER_CONFIG"], "num_layers", 2)


def same(one: Path, other: Path) -> None:
    """Compare all of two checkpoints but their clocks."""
    left, right = (torch.load(path, weights_only=False) for path in (one, other))
    for state in (left, right):
        del state["clock"]
    (values, structure), (others, other) = (torch.utils._pytree.tree_flatten(state) for state in (left, right))
    assert structure == other
    for a, b in zip(values, others, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert sum(isinstance(a, torch.Tensor) for a in values) > 50


def test_the_autoencoders_training_resumes_bit_for_bit(tmp_path):
    train_vae.train(VAE, tmp_path / "whole", None, Steps(6))
    for part in (3, 2, 1):  # before, at and after the step that fixes the encoder
        train_vae.train(VAE, tmp_path / "parts", None, Steps(part))
    same(tmp_path / "whole" / "checkpoint.pt", tmp_path / "parts" / "checkpoint.pt")
    assert (tmp_path / "parts" / "vae" / "config.json").exists()
    fixed, last = (train_vae.first_autoencoder(tmp_path / "parts" / name) for name in ("frozen", "vae"))
    assert torch.equal(fixed.encoder.conv_in.weight, last.encoder.conv_in.weight)
    assert not torch.equal(fixed.decoder.conv_in.weight, last.decoder.conv_in.weight)


@pytest.mark.slow
def test_the_transformers_training_resumes_bit_for_bit_and_refuses_another_recipe(tmp_path):
    torch.manual_seed(0)
    train_vae.first_autoencoder(None).save_pretrained(tmp_path / "vae")
    train = train_transformer.train
    train(TRANSFORMER, tmp_path / "whole", tmp_path / "vae", Steps(4))
    for part in (1, 3):
        train(TRANSFORMER, tmp_path / "parts", tmp_path / "vae", Steps(part))
    same(tmp_path / "whole" / "checkpoint.pt", tmp_path / "parts" / "checkpoint.pt")
    events = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert [(e["event"], e["step"]) for e in events] == [("start", 0), ("pause", 1), ("start", 1), ("end", 4)]
    assert events[2]["config"]["seed"] == TRANSFORMER.seed
    other = replace(TRANSFORMER, steps=5, shift=3.0)
    with pytest.raises(ValueError, match=r"steps: 4 there, 5 requested; .*shift: 5.0 there, 3.0 requested"):
        train(other, tmp_path / "parts", tmp_path / "vae", Steps(1))


def test_a_training_goes_on_from_an_embedded_models_weights(tmp_path, monkeypatch):
    torch.manual_seed(3)
    packed = train_transformer.build_pipeline(train_vae.first_autoencoder(None))
    packed.save_pretrained(tmp_path / "packed")
    monkeypatch.setattr(train_transformer, "model_path", lambda name: tmp_path / name)
    pipe = train_transformer.prepare(replace(TRANSFORMER, start="packed"), packed.vae)
    fresh = train_transformer.prepare(TRANSFORMER, packed.vae)
    for name in ("transformer", "text_encoder"):
        wanted, found, other = (getattr(p, name).state_dict() for p in (packed, pipe, fresh))
        assert all(torch.equal(found[key], value) for key, value in wanted.items())
        assert not all(torch.equal(other[key], value) for key, value in wanted.items())


def test_what_is_seen_at_a_token_is_what_the_painter_shows_there():
    scene = world.scene_of(3, 6, height=48, width=64)  # of two things
    seen = reading.coverage(scene, 17)
    assert seen.shape == (3, 9, 6, 8)
    masks = painter.masks(scene, 17)
    row, column = divmod(int(seen[0, 2].argmax()), 8)  # in the second pair of frames after the first one
    share = masks[0, 3:5, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].mean()
    assert share > 0.3
    assert seen[0, 2, row, column] == pytest.approx(255 * share, abs=1)
    assert seen[len(masks) :].max() == 0
    assert torch.equal(reading.coverage(scene, 1), seen[:, :1])


def test_a_reader_that_knows_the_answers_loses_what_shared_tokens_leave_open_alone():
    scene = world.scene_of(3, 9, height=48, width=64)
    seen = reading.coverage(scene, 1)[None]
    shares = seen.float().div(255).flatten(2)[0].mT
    shares = torch.cat([shares, 1 - shares.sum(-1, keepdim=True)], -1)
    logs, reader = shares.clamp(min=1e-9).log(), reading.Reader(4)
    for x in (reader.answer.weight, reader.answer.bias):
        torch.nn.init.zeros_(x)
    states, answers = torch.zeros(1, len(shares), 4), []
    even = reader.loss(states, [scene], seen).item()
    assert even == pytest.approx(np.log(reading.WIDTHS).mean(), rel=1e-5)
    for (name, words), width in zip(reading.QUESTIONS.items(), reading.WIDTHS, strict=True):
        answer = torch.full((len(shares), width), -30.0)  # log-shares of the question's words, of what is there
        chosen = [words.index(getattr(thing, name)) for thing in scene.things]
        assert len(set(chosen)) == len(scene.things)
        answer[:, [*chosen, len(words)]] = logs[:, [*range(len(chosen)), -1]]
        answers.append(answer)
    reader.answer.forward = lambda states: torch.cat(answers, -1)[None]
    least = -(shares * logs).sum(-1).mean().item()
    assert reader.loss(states, [scene], seen).item() == pytest.approx(least, abs=1e-4)
    assert least < even / 3


@pytest.mark.slow
def test_several_processes_train_as_one_does_stop_together_and_write_once(tmp_path):
    alone = training_ranks.train(0, 1, str(tmp_path / "one"), (6,))
    both = processes(2, training_ranks.train, str(tmp_path / "two"), (6, 2))  # the second one's budget ends first
    assert both[0] == both[1] == pytest.approx(alone, abs=1e-6)
    lines = training_ranks.told(tmp_path / "two")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    events = [(line["event"], line["step"], line.get("processes")) for line in lines if "event" in line]
    assert events == [
        ("start", 0, 2), ("pause", 2, None), ("start", 2, 2), ("pause", 4, None), ("start", 4, 2), ("end", 6, None),
    ]  # fmt: skip
    assert (tmp_path / "two" / "checkpoint.pt").exists()


def test_figures_are_kept_for_the_same_weights_and_setting_alone_clocks_go_on_and_the_budget_ends(tmp_path):
    subject = {"model": "step 3", "weights": "ab", "size": 64}
    path = tmp_path / "acceptance.json"
    assert accept.kept_figures(path, subject) == subject
    path.write_text(json.dumps({**subject, "judge": {"score": 0.5}}))
    assert accept.kept_figures(path, subject)["judge"] == {"score": 0.5}
    for other in ({**subject, "weights": "cd"}, {**subject, "size": 48}):
        assert accept.kept_figures(path, other) == other
    budget = loop.Budget(1.0)
    assert (loop.Budget(0.0).left(), budget.left(), budget.due()) == (False, True, False)
    budget.stop()
    assert (budget.left(), loop.Budget(1.0, every=0.0).due()) == (False, True)
    assert loop.Log(tmp_path / "log.jsonl", wall=100.0, cpu=50.0).clocks()["wall"] >= 100.0


def test_the_mass_of_the_heaviest_tiles():
    tokens, width = 256, 8
    key = torch.zeros(tokens, width)
    even = concentration.tile_mass(key, key)
    assert torch.allclose(even, torch.full((4, 4), 0.25))
    assert concentration.heaviest(even, 0.25) == pytest.approx(0.25)
    ragged = concentration.tile_mass(key[:100], key[:100])
    assert torch.allclose(ragged, torch.tensor([[0.64, 0.36], [0.64, 0.36]]))
    key[64:128] = 20.0  # one tile draws all
    assert concentration.heaviest(concentration.tile_mass(key + 1, key), 0.25) == pytest.approx(1.0)


def test_the_attention_of_training_computes_what_the_pipelines_does():
    torch.manual_seed(0)
    pipe = train_transformer.prepare(TRANSFORMER, train_vae.first_autoencoder(None))
    torch.nn.init.normal_(pipe.transformer.proj_out.weight)
    latents, level = torch.randn(2, 12, 3, 8, 8), torch.tensor([500.0, 900.0])
    text = torch.zeros(2, 64, 96)
    text[:, :5] = torch.randn(2, 5, 96)
    for block in pipe.transformer.blocks:  # five words, and 59 pads in one key
        block.attn2.processor.bias = torch.tensor([0.0] * 5 + [59.0]).add(1e-9).log().clamp(min=0)[None, None, None]
    with torch.no_grad():
        fast = pipe.transformer(latents, level, text[:, :6], return_dict=False)[0]
        train_transformer.use_training_attention(pipe, False)
        plain = pipe.transformer(latents, level, text, return_dict=False)[0]
        other = pipe.transformer(latents, level, text[:, :6], return_dict=False)[0]
    assert torch.allclose(fast, plain, atol=2e-5)
    assert not torch.allclose(other, plain, atol=1e-3)


def test_a_training_starts_with_the_sharper_queries_of_an_embedded_model():
    recipe = train_image.FluxTraining(start="flux-tiny", sharpen=2.0)
    pipe = train_image.build_flux_pipeline(None)
    train_transformer.begin(pipe, recipe, ("transformer",))
    folder = train_transformer.model_path("flux-tiny") / "transformer"
    stored = type(pipe.transformer).from_pretrained(folder, dtype=torch.float32).state_dict()
    queries = {name for name in stored if name.endswith(("norm_q.weight", "norm_added_q.weight"))}
    assert len(queries) == 16
    for name, weight in pipe.transformer.state_dict().items():
        assert torch.equal(weight, stored[name] * (2 if name in queries else 1))
    held = {name for name, weight in pipe.transformer.named_parameters() if not weight.requires_grad}
    assert {name.split(".")[-2] for name in held} == train_transformer.QUERIES_AND_KEYS
    assert len(held) == 8 * 4 + 12 * 4 + 8 * 2


def test_parts_of_shards_and_folders_without_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"3 clips.*multiple of 2"):
        pool.Pool(tmp_path, None, 0, 32, 32, 17, 3)
    for trained in (export.trained_pipeline, train_image.trained_flux):
        with pytest.raises(FileNotFoundError, match=r"checkpoint at .*train"):
            trained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"packed weights.*model_index\.json"):
        subjects.Video().load(tmp_path, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"packed weights.*lacks config\.json"):
        train_transformer.train(TRANSFORMER, tmp_path / "run", tmp_path, loop.Budget(1.0))


def test_two_trainings_are_packed_half_each():
    halves = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        halves.append(train_image.build_flux_pipeline(None))
    one, other = ({k: w.clone() for k, w in half.transformer.named_parameters()} for half in halves)
    export.average_in(*halves)
    for key, weight in halves[0].transformer.named_parameters():
        assert torch.allclose(weight, (one[key] + other[key]) / 2, atol=1e-7)
    assert not torch.equal(one["proj_out.weight"], other["proj_out.weight"])


@pytest.mark.slow
def test_a_lora_of_few_steps_is_packed_judged_and_loaded_into_its_base(tmp_path, monkeypatch, capsys):
    models = tmp_path / "models"
    shutil.copytree(catalog.MODELS / "wan-tiny", models / "wan-tiny")
    for module in (catalog, loading, export_lora):
        monkeypatch.setattr(module, "MODELS", models)
    monkeypatch.setattr(export_lora, "LOGS", tmp_path)
    scores = {("wan-tiny-4", 4): 0.75, ("wan-tiny", 4): 0.5, ("wan-tiny", 20): 0.79}
    names = {1.0: "wan-tiny-4", 4.0: "wan-tiny"}
    monkeypatch.setattr(accept, "judged", lambda *args: {"score": scores[names[args[-1]], args[-2]]})
    trained = distill.Video("wan-tiny")
    before = {name: weight.clone() for name, weight in trained.pipe.transformer.state_dict().items()}
    distill.add_lora(trained, 2)
    weights = dict(trained.pipe.transformer.named_parameters())
    changed = "blocks.3.attn1.to_q"
    torch.nn.init.normal_(weights[f"{changed}.lora_B.default.weight"])
    recipe = {"model": "wan-tiny", "student_steps": 4, "flow_shift": 3.0}
    torch.save({"recipe": recipe, "step": 7, "averages": {"transformer": weights}}, tmp_path / "checkpoint.pt")
    (tmp_path / "log.jsonl").touch()
    for usual, passed in ((0.79, True), (0.81, False)):
        scores["wan-tiny", 20] = usual
        monkeypatch.setattr(sys, "argv", ["export_lora.py", str(tmp_path)])
        export_lora.main()
        figures = json.loads((tmp_path / "wan-tiny-4.acceptance.json").read_text())
        assert (figures["step"], figures["judge"]["passed"], figures["judge"]["without"]["score"]) == (7, passed, 0.5)
    pipe = load("wan-tiny", few_steps=4)
    assert (type(pipe.scheduler).__name__, pipe.scheduler.config.shift) == ("FlowMatchEulerDiscreteScheduler", 3.0)
    assert {"num_inference_steps": 4, "guidance_scale": 1.0}.items() <= catalog.model_defaults("wan-tiny-4").items()
    added = weights[f"{changed}.lora_B.default.weight"] @ weights[f"{changed}.lora_A.default.weight"]
    for name, weight in pipe.transformer.state_dict().items():  # plain weights, the LoRA added
        wanted = before[name] + (added if name == f"{changed}.weight" else 0)
        assert torch.allclose(weight, wanted, atol=2e-3), name
    assert sum(file.stat().st_size for file in (models / "wan-tiny-4").rglob("*.*") if file.is_file()) < 1_500_000


def test_sharper_queries_are_those_of_self_attention_alone():
    plain, sharper = (
        train_transformer.prepare(replace(TRANSFORMER, sharpen=factor), train_vae.first_autoencoder(None)).transformer
        for factor in (1.0, 1.5)
    )
    for block, other in zip(plain.blocks, sharper.blocks, strict=True):
        for factor, layer, name in ((1.5, "attn1", "norm_q"), (1, "attn1", "norm_k"), (1, "attn2", "norm_q")):
            weight, sharp = (getattr(getattr(x, layer), name).weight for x in (block, other))
            assert torch.equal(sharp, factor * weight)
        held = (other.attn1.to_k, other.attn2.to_q, block.attn1.to_q)
        assert [x.weight.requires_grad for x in held] == [False, True, True]


@pytest.mark.slow
def test_the_image_models_trainings_resume_bit_for_bit_and_make_a_pipeline(tmp_path, monkeypatch):
    for name in ("num_layers", "num_single_layers"):
        monkeypatch.setitem(train_image.build_flux_pipeline.__globals__["FLUX_CONFIG"], name, 1)
    vae = train_image.ImageVaeTraining(steps=2, picture=48, crop=32, batch=1)
    flux = train_image.FluxTraining(steps=3, sizes=((0.5, 48, 2), (0.5, 64, 1)))
    for name, parts in (("whole", (3,)), ("parts", (1, 2))):
        folder = tmp_path / name
        for part in parts:
            train_image.train_autoencoder(vae, folder / "image-vae", Steps(part))
        for part in parts:
            train_image.train_flux(flux, folder / "flux", folder / "image-vae" / "vae", Steps(part))
    for run in ("image-vae", "flux"):
        same(tmp_path / "whole" / run / "checkpoint.pt", tmp_path / "parts" / run / "checkpoint.pt")
    words = ("export.py", "--image", "--runs", tmp_path / "whole", "--out", tmp_path / "flux-tiny")
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    monkeypatch.setattr(export, "LOGS", tmp_path)
    export.main()
    judged(subjects.Image(), tmp_path / "flux-tiny", tmp_path / "whole", (48, 64))


@pytest.mark.slow
def test_the_video_model_is_judged_from_its_trainings_as_packed(tmp_path):
    train_vae.train(VAE, tmp_path / "vae", None, Steps(6))
    train_transformer.train(TRANSFORMER, tmp_path / "transformer", tmp_path / "vae" / "frozen", Steps(4))
    judged(subjects.Video(), None, tmp_path, (32, 48))


def judged(subject: subjects.Subject, model: Path | None, runs: Path, size: tuple[int, int]) -> None:
    """Run what the gates run on a model that knows nothing yet."""
    subject.frames = min(subject.frames, 5)
    subject.crowded = (48, subject.frames)
    pipe, name = subject.load(model, runs)
    assert name == ("step 4" if model is None else model.name)
    scenes = subject.scenes(5, size)
    videos = list(subject.generate(pipe, scenes, subject.frames, 2, 4.0))
    assert [video.shape for video in videos] == [(subject.frames, *size, 3)] * 5
    assert all(np.isfinite(video).all() for video in videos)
    again, unguided = (next(subject.generate(pipe, scenes[:1], subject.frames, 2, scale)) for scale in (4.0, 1.0))
    assert np.abs(again - videos[0]).max() < 1e-3
    assert not np.array_equal(unguided, again)
    rows = (2 if subject.frames == 1 else 5) * size[0]
    assert samples.sheet(videos).height == 2 * rows
    assert not set(accept.subject_of(name, pipe, 48, 20, 4.0)) & set(accept.GATES)
    figures = accept.steps_gate(subject, pipe, scenes[:1], 4.0, 32)
    assert figures["reference_steps"] == 32
    assert 0 <= accept.judged(subject, pipe, scenes[:2], subject.frames, 2, 4.0)["score"] <= 1
    assert np.isfinite(accept.reconstruction(subject, pipe, scenes[:2])["mean_db"])
    masses, tokens = concentration.heaviest_mass(subject, pipe, share=0.25, guidance=4.0, steps=2)
    grid = (48 // 8) ** 2
    assert masses.shape == (2, 2, 2)
    assert tokens == (grid + 64 if subject.frames == 1 else 3 * grid)
    assert ((masses > 0) & (masses <= 1 + 1e-6)).all()
