"""What a suite asks of its runs: repeats, schedulers, guiders, a full disk; models of a folder or hub id."""

import dataclasses
import errno
import functools
import json
import os
from pathlib import Path

import diffusers
import numpy as np
import pytest
from diffusers import DiffusionPipeline
from dit_accel_assets import model_path
from dit_accel_eval.runs import loaded as given
from dit_accel_eval.runs import results
from dit_accel_eval.runs.loaded import Machine, OwnClips
from dit_accel_eval.runs.model import OWN, SuiteModel, arm_scheduler, check_guided, guided_by
from dit_accel_eval.runs.results import append_line, read_kept, read_lines, run_of, write_lines
from dit_accel_eval.suites import reference
from dit_accel_eval.suites.job import Job
from dit_accel_eval.suites.suite import read_suite
from fake_model import ARM, HEAD, FakeModel, command, faked, refuses
from model_folders import model_folder
from tiny_stock import stock_pipeline

from dit_accel import ConfigError
from dit_accel.adapters.installed import adapter_for
from dit_accel.errors import UnsupportedModel

SMALL = {"num_frames": 5, "height": 32, "width": 32}


class CountedModel(FakeModel):
    """The n-th run of all takes n seconds."""

    def cost(self, steps, methods):
        return {**super().cost(steps, ()), "seconds": float(len(self.made))}


@pytest.fixture
def fake(monkeypatch):
    yield from faked(monkeypatch, CountedModel)


@pytest.fixture
def ready(tmp_path, fake):
    """Writes a suite with further keys; returns its command's run."""

    def run(further: str = "", *options: str):
        (tmp_path / "s.toml").write_text(HEAD + further + ARM)
        return command("run", tmp_path / "s.toml", "--out", tmp_path / "s.jsonl", "--cache", tmp_path / "c", *options)

    return run


def test_repeats_are_told_by_median_and_quartiles_and_warm_up_is_not(ready, fake, tmp_path):
    assert ready("repeats = 3\nwarmup = 2\n").exit_code == 0
    # 16 and 32 steps, two to warm up, three that count; then the dense run of two steps likewise
    assert [steps for _, steps, *_ in fake.made] == [16, 32, *[2] * 10]
    arm, dense = read_lines(tmp_path / "s.jsonl")
    assert arm["repeated"] == {"seconds": [5.0, 6.0, 7.0], "median": 6.0, "quartiles": [5.5, 6.5]}
    assert dense["repeated"]["seconds"] == [10.0, 11.0, 12.0]
    assert ready("repeats = 3\nwarmup = 2\n").exit_code == 0
    assert len(fake.made) == 12
    assert ready("repeats = 4\n").exit_code == 0  # what has fewer is made anew
    assert [len(line["repeated"]["seconds"]) for line in read_lines(tmp_path / "s.jsonl")] == [4, 4]


FLOW = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def test_a_scheduler_takes_options_and_the_model_s_own_is_fresh():
    made = arm_scheduler(FLOW, "UniPCMultistepScheduler", {"solver_order": 3, "flow_shift": 5.0}, None)
    assert (made.config.solver_order, made.config.flow_shift) == (3, 5.0)
    own = arm_scheduler(FLOW, OWN, {}, None)
    assert (own.config.shift, own is FLOW) == (3.0, False)
    with pytest.raises(ConfigError, match=r"noise schedule, got flow_shift 2\.0"):
        arm_scheduler(FLOW, OWN, {}, 2.0)
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=1.2)
    assert arm_scheduler(dynamic, "FlowMatchHeunDiscreteScheduler", {}, None).config.max_shift == 1.2
    betas = arm_scheduler(diffusers.DDIMScheduler(), "DEISMultistepScheduler", {"solver_order": 3}, None)
    assert (len(betas.betas), betas.config.solver_order) == (1000, 3)
    with pytest.raises(ConfigError, match=r"DDIMScheduler.*flow_shift 2\.0"):
        arm_scheduler(diffusers.DDIMScheduler(), "unipc", {}, 2.0)


def test_an_arm_with_a_scheduler_runs_and_is_told(tmp_path):
    arm = '[[arm]]\nname = "third"\nnum_inference_steps = 6\nscheduler = { UniPCMultistepScheduler = '
    (tmp_path / "s.toml").write_text(HEAD + arm + "{ solver_order = 3 } }\n")
    suite = read_suite(tmp_path / "s.toml")
    (read,) = suite.arms
    job = Job(suite=suite, out=tmp_path, cache=tmp_path, timed=False, threads=1)
    assert job.arm_setting(read)["scheduler"] == {"solver_order": 3}
    model = given.EmbeddedModel("wan-plain", SMALL)
    third = model.run(0, **read.run_options())
    same = model.run(0, steps=6, solver="UniPCMultistepScheduler", scheduler={"solver_order": 2})
    usual = model.run(0, steps=6, solver="unipc")
    assert np.array_equal(same.frames, usual.frames)
    assert not np.array_equal(third.frames, usual.frames)


class Pictures(SuiteModel):
    """HunyuanImage's pipeline, which guides by a guider, with embeddings for a prompt."""

    def __init__(self):
        pipe, call = stock_pipeline("HunyuanImagePipeline")
        adapter = adapter_for("HunyuanImageTransformer2DModel")
        call = {key: value for key, value in call.items() if key not in ("num_inference_steps", "output_type")}
        call["width"] = 96
        about = {"weights": "w", "call": call, "adapter": adapter, "family": adapter.families[0]}
        super().__init__(pipe, name="pictures", prompt=lambda clip: None, seed=lambda clip: clip, **about)


def test_a_guider_takes_the_place_of_the_pipeline_s_own_for_its_arm():
    model = Pictures()
    own = model.pipe.guider
    usual = model.run(0, steps=2, solver="unipc")
    plain = model.run(0, steps=2, solver="unipc", guider={"ClassifierFreeGuidance": {"guidance_scale": 3.0}})
    off = model.run(0, steps=2, solver="unipc", guider={"ClassifierFreeGuidance": {"enabled": False}})
    assert model.pipe.guider is own
    assert np.array_equal(usual.frames, model.run(0, steps=2, solver="unipc").frames)
    assert not np.array_equal(plain.frames, usual.frames)
    assert off.counts.blocks * 2 == plain.counts.blocks
    with (
        pytest.raises(ConfigError, match=r"PerturbedAttentionGuidance.*not accept"),
        guided_by(model.pipe, {"PerturbedAttentionGuidance": {}}),
    ):
        pytest.fail("it was taken")
    with pytest.raises(ConfigError, match=r"WanPipeline.*guider.*HunyuanVideo 1\.5"):
        check_guided(diffusers.WanPipeline)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_up_while_lines_are_written_loses_no_other(tmp_path, monkeypatch):
    path = tmp_path / "s.jsonl"
    append_line(path, {"clip": 0})
    whole = path.read_bytes()
    write = os.write

    def half(handle, data):
        return write(handle, data[:5]) if data.startswith(b"{") else full(handle, data)

    def full(*_, **__):
        raise FULL

    for broken in (half, full):
        monkeypatch.setattr(results.os, "write", broken)
        with pytest.raises(ConfigError, match=r"s\.jsonl.*\(No space left"):
            append_line(path, {"clip": 1})
        monkeypatch.setattr(results.os, "write", write)
        assert path.read_bytes() == whole
    append_line(path, {"clip": 2})
    assert [line["clip"] for line in read_lines(path)] == [0, 2]
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ConfigError, match=r"s\.jsonl.*\(No space left"):
        write_lines(path, [{"clip": 1}])
    assert [line["clip"] for line in read_lines(path)] == [0, 2]


PROMPTS = ("a red circle moving right", "a blue square going up")
TINY = 'version = 2\nname = "s"\nmodel = "tiny"\n'
PROMPTED = f"prompts = {json.dumps(PROMPTS)}\n"
CALL = "call = { height = 32, width = 32, num_frames = 5, guidance_scale = 2.0 }\n"
THIN = '[[arm]]\nname = "thin"\nnum_inference_steps = 3\nsol = { block_size = 16, dense_steps = 0, beta = 0.5 }\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a suite's file and, beside it, a diffusers pipeline that is no embedded model."""
    root = tmp_path_factory.mktemp("given")
    model_folder(root / "tiny")
    return root


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """The folder with the results of a suite that ran."""
    (folder / "s.toml").write_text(TINY + PROMPTED + 'metrics = ["psnr", "ms-ssim"]\n' + CALL + ARM + THIN)
    options = ["--out", folder / "s.jsonl", "--cache", folder / "cache", "--frames", folder / "frames"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "converged", functools.partial(reference.converged, first=4, most=8))
        found = command("run", folder / "s.toml", *options, "--threads", 1)
    assert found.exit_code == 0, found.output
    assert "s: 2 clips x " in found.stderr
    return folder


def test_a_folder_makes_what_its_embedded_model_makes(folder):
    call = {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 4.0, "negative_prompt": ""}
    call |= {
        key: value for key, value in given.embedded_call("wan-plain", call).items() if key == "max_sequence_length"
    }
    own = OwnClips(prompts=PROMPTS)
    ours = given.EmbeddedModel("wan-plain", call, own=own)
    theirs = given.GivenModel("tiny", str(folder / "tiny"), ours.call, own, "float32", Machine(device="cpu"))
    first, second = (model.run(1, steps=2, solver="unipc") for model in (ours, theirs))
    assert np.array_equal(first.frames, second.frames)
    assert first.counts == second.counts
    assert (theirs.prompt(1), theirs.seed(1), theirs.dtype) == (PROMPTS[1], 1, "float32")


@pytest.mark.slow
def test_a_suite_of_a_folder_runs_goes_on_and_reports(whole):
    lines = read_lines(whole / "s.jsonl")
    assert {(line["clip"], line["prompt"], line["seed"]) for line in lines} == {(0, PROMPTS[0], 0), (1, PROMPTS[1], 1)}
    assert {line["model"] for line in lines} == {"tiny"}
    assert {line["weights"] for line in lines} == {given.given_weights(str(whole / "tiny"))}
    assert {line["dtype"] for line in lines} == {"float32"}
    assert all("score" not in line and "tiny has no judge" in line["skipped"]["score"] for line in lines)
    (tokens,) = {line["tokens"] for line in lines}
    thin = next(line for line in lines if line["arm"] == "thin")
    assert 0.3 < thin["attended"] < 0.9
    assert read_kept(whole / thin["kept"], run_of(thin)).shape == (5, 32, 32, 3)
    again = command("run", whole / "s.toml", "--out", whole / "s.jsonl", "--cache", whole / "cache")
    assert (again.exit_code, read_lines(whole / "s.jsonl")) == (0, lines)
    assert "| score |" not in again.stdout
    page = command("report", whole / "s.jsonl", "-o", whole / "s.html", "--json", whole / "r")
    assert page.exit_code == 0, page.output
    text = (whole / "s.html").read_text()
    assert "score was skipped on 2 clips: tiny has no judge of its own." in text
    assert f"steps of the dense model, of {tokens} tokens, less" in text


def test_what_a_model_can_not_run_is_told_before_it_is_loaded(folder, monkeypatch):
    for text, message in (
        (ARM, "s has no prompts, and only embedded models have held-out ones; add prompts = [...]"),
        (PROMPTED + "call = { frames = 5 }\n" + ARM, "takes no 'frames'; did you mean 'num_frames'"),
        (PROMPTED + ARM + "guider = { ClassifierFreeGuidance = {} }\n", "arm 'a': WanPipeline takes no guider; "),
    ):
        monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
        clips = "" if "prompts" in text else "clips = 1\n"
        (folder / "bad.toml").write_text(TINY + clips + text)
        refuses(message, "run", folder / "bad.toml", "--out", folder / "bad.jsonl", "--device", "cpu")
        assert not (folder / "bad.jsonl").exists()


def test_a_model_that_is_nowhere_and_schedulers_that_can_not_be_matched_are_told(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"'tinny'.*pipeline"):
        given.check_given("tinny")
    model_folder(tmp_path / "m")
    config = tmp_path / "m" / "scheduler" / "scheduler_config.json"
    config.unlink()
    config.write_text('{"_class_name": "EDMEulerScheduler"}')
    with pytest.raises(UnsupportedModel, match=r"EDMEulerScheduler.*noise shift"):
        given.check_given(str(tmp_path / "m"))
    config.write_text('{"_class_name": "SomeScheduler"}')
    with pytest.raises(UnsupportedModel, match=r"'SomeScheduler'.*diffusers"):
        given.check_given(str(tmp_path / "m"))


def test_a_hub_id_is_fetched_by_diffusers_and_known_by_its_blobs(monkeypatch, tmp_path):
    snapshot, asked = tmp_path / "snapshots" / "abc" / "transformer", []
    (tmp_path / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    download = lambda *got, **options: asked.append((*got, options)) or str(snapshot.parent)  # noqa: E731
    monkeypatch.setattr(DiffusionPipeline, "download", download)
    monkeypatch.setattr(given.hashlib, "file_digest", lambda *_: pytest.fail("a blob was read"))
    given.local_folder.cache_clear()
    found = []
    for name in ("a" * 64, "b" * 64):
        (tmp_path / "blobs" / name).write_bytes(name.encode())
        (snapshot / "model.safetensors").unlink(missing_ok=True)
        (snapshot / "model.safetensors").symlink_to(tmp_path / "blobs" / name)
        given.given_weights.cache_clear()
        found.append(given.given_weights("owner/name"))
    assert found[0] != found[1]
    assert (asked, given.local_folder("owner/name")) == ([("owner/name", {"use_safetensors": True})], snapshot.parent)

    def gone(name, **options):
        raise OSError("no route to the hub\nand more")

    given.local_folder.cache_clear()
    monkeypatch.setattr(DiffusionPipeline, "download", gone)
    with pytest.raises(UnsupportedModel, match=r"weights.*'owner/name'.*: no route"):
        given.local_folder("owner/name")
    for cached in (given.local_folder, given.given_weights):
        cached.cache_clear()


def test_the_number_format_is_told_and_is_the_machine_s_where_none_is_named(folder):
    (folder / "d.toml").write_text(TINY + PROMPTED + ARM)
    suite = read_suite(folder / "d.toml")
    job = Job(suite=suite, out=folder, cache=folder, timed=False, threads=None)
    assert job.machine == Machine()
    job = dataclasses.replace(job, machine=Machine(device="cpu"))
    assert job.setting["dtype"] == "float32"
    asked = dataclasses.replace(suite, dtype="bfloat16")
    assert dataclasses.replace(job, suite=asked).setting["dtype"] == "bfloat16"
    embedded = dataclasses.replace(suite, model="wan-plain")
    assert "dtype" not in dataclasses.replace(job, suite=embedded).setting
    assert model_path("wan-plain") != Path(suite.source)
