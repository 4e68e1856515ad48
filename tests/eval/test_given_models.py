"""Suites of any model: a folder or hub id with prompts and seeds of one's own, warm-up and repeats."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from dit_accel_assets import model_path
from dit_accel_eval.runs import loaded as given
from dit_accel_eval.runs.conditions import Machine, OwnClips
from dit_accel_eval.runs.loaded import (
    EmbeddedModel,
    GivenModel,
    check_given,
    embedded_call,
    given_weights,
    local_folder,
)
from dit_accel_eval.runs.results import read_kept, read_lines, run_of
from dit_accel_eval.suites import reference
from dit_accel_eval.suites.job import Job
from dit_accel_eval.suites.suite import read_suite
from fake_model import ARM, command, told
from model_folders import model_folder

from dit_accel import ConfigError
from dit_accel.errors import UnsupportedModel

PROMPTS = ("a red circle moving right", "a blue square going up")
HEAD = 'version = 2\nname = "s"\nmodel = "tiny"\n'
OWN = f"prompts = {json.dumps(PROMPTS)}\n"
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
    (folder / "s.toml").write_text(HEAD + OWN + 'metrics = ["psnr", "ms-ssim"]\n' + CALL + ARM + THIN)
    options = ["--out", folder / "s.jsonl", "--cache", folder / "cache", "--frames", folder / "frames"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "converged", functools.partial(reference.converged, first=4, most=8))
        found = command("run", folder / "s.toml", *options, "--threads", 1)
    assert found.exit_code == 0, found.output
    assert "s: 2 clips x " in found.stderr
    return folder


def test_a_folder_makes_what_its_embedded_model_makes(folder):
    call = {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 4.0, "negative_prompt": ""}
    call |= {key: value for key, value in embedded_call("wan-plain", call).items() if key == "max_sequence_length"}
    own = OwnClips(prompts=PROMPTS)
    ours = EmbeddedModel("wan-plain", call, own=own)
    theirs = GivenModel("tiny", str(folder / "tiny"), ours.call, own, "float32", Machine(device="cpu"))
    first, second = (model.run(1, steps=2, solver="unipc") for model in (ours, theirs))
    assert np.array_equal(first.frames, second.frames)
    assert first.counts == second.counts
    assert (theirs.prompt(1), theirs.seed(1), theirs.dtype) == (PROMPTS[1], 1, "float32")


@pytest.mark.slow
def test_a_suite_of_a_folder_runs_goes_on_and_reports(whole):
    lines = read_lines(whole / "s.jsonl")
    assert {(line["clip"], line["prompt"], line["seed"]) for line in lines} == {(0, PROMPTS[0], 0), (1, PROMPTS[1], 1)}
    assert {line["model"] for line in lines} == {"tiny"}
    assert {line["weights"] for line in lines} == {given_weights(str(whole / "tiny"))}
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
        (OWN + "call = { frames = 5 }\n" + ARM, "takes no 'frames'; did you mean 'num_frames'"),
        (OWN + ARM + "guider = { ClassifierFreeGuidance = {} }\n", "arm 'a': WanPipeline takes no guider; "),
    ):
        monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
        clips = "" if "prompts" in text else "clips = 1\n"
        (folder / "bad.toml").write_text(HEAD + clips + text)
        found = command("run", folder / "bad.toml", "--out", folder / "bad.jsonl", "--device", "cpu")
        assert (found.exit_code, message in told(found)) == (2, True)
        assert not (folder / "bad.jsonl").exists()


def test_a_model_that_is_nowhere_and_schedulers_that_can_not_be_matched_are_told(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"'tinny'.*pipeline"):
        check_given("tinny")
    model_folder(tmp_path / "m")
    config = tmp_path / "m" / "scheduler" / "scheduler_config.json"
    config.unlink()
    config.write_text('{"_class_name": "EDMEulerScheduler"}')
    with pytest.raises(UnsupportedModel, match=r"EDMEulerScheduler.*noise shift"):
        check_given(str(tmp_path / "m"))
    config.write_text('{"_class_name": "SomeScheduler"}')
    with pytest.raises(UnsupportedModel, match=r"'SomeScheduler'.*diffusers"):
        check_given(str(tmp_path / "m"))


def test_a_hub_id_is_fetched_by_diffusers_and_known_by_its_blobs(monkeypatch, tmp_path):
    snapshot, asked = tmp_path / "snapshots" / "abc" / "transformer", []
    (tmp_path / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    download = lambda *got, **options: asked.append((*got, options)) or str(snapshot.parent)  # noqa: E731
    monkeypatch.setattr(DiffusionPipeline, "download", download)
    monkeypatch.setattr(given.hashlib, "file_digest", lambda *_: pytest.fail("a blob was read"))
    local_folder.cache_clear()
    found = []
    for name in ("a" * 64, "b" * 64):
        (tmp_path / "blobs" / name).write_bytes(name.encode())
        (snapshot / "model.safetensors").unlink(missing_ok=True)
        (snapshot / "model.safetensors").symlink_to(tmp_path / "blobs" / name)
        given_weights.cache_clear()
        found.append(given_weights("owner/name"))
    assert found[0] != found[1]
    assert (asked, local_folder("owner/name")) == ([("owner/name", {"use_safetensors": True})], snapshot.parent)

    def gone(name, **options):
        raise OSError("no route to the hub\nand more")

    local_folder.cache_clear()
    monkeypatch.setattr(DiffusionPipeline, "download", gone)
    with pytest.raises(UnsupportedModel, match=r"weights.*'owner/name'.*: no route"):
        local_folder("owner/name")
    for cached in (local_folder, given_weights):
        cached.cache_clear()


def test_the_number_format_is_told_and_is_the_machine_s_where_none_is_named(folder):
    (folder / "d.toml").write_text(HEAD + OWN + ARM)
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
