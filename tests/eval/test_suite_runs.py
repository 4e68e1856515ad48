"""What a suite asks of its runs besides: warm-up and repeats, schedulers by class, guiders, a full disk."""

import errno
import os
import re
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import PIL.Image
import pytest
from dit_accel_eval.runs import results
from dit_accel_eval.runs.loaded import EmbeddedModel
from dit_accel_eval.runs.model import OWN, SuiteModel, arm_scheduler, check_guided, guided
from dit_accel_eval.runs.results import append_line, keep, read_lines, write_lines
from dit_accel_eval.suites import reference
from dit_accel_eval.suites.job import Job
from dit_accel_eval.suites.suite import read_suite
from fake_model import ARM, HEAD, FakeModel, command, faked
from tiny_stock import stock_pipeline

from dit_accel import ConfigError
from dit_accel.adapters.installed import adapter_for

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
    model = EmbeddedModel("wan-plain", SMALL)
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
        clips = SimpleNamespace(prompt=lambda clip: None, seed=lambda clip: clip)
        super().__init__(
            pipe, name="pictures", weights="w", call=call, adapter=adapter, family=adapter.families[0], clips=clips
        )


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
        guided(model.pipe, {"PerturbedAttentionGuidance": {}}),
    ):
        pytest.fail("it was taken")
    with pytest.raises(ConfigError, match=r"WanPipeline.*guider.*HunyuanVideo 1\.5"):
        check_guided(diffusers.WanPipeline)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_up_while_a_line_is_appended_loses_no_other(tmp_path, monkeypatch):
    path = tmp_path / "s.jsonl"
    append_line(path, {"clip": 0})
    whole = path.read_bytes()
    write = os.write

    def half(handle, data):
        return write(handle, data[:5]) if data.startswith(b"{") else full(handle, data)

    def full(handle, data):
        raise FULL

    for broken in (half, full):
        monkeypatch.setattr(results.os, "write", broken)
        with pytest.raises(ConfigError, match=r"s\.jsonl.*\(No space left"):
            append_line(path, {"clip": 1})
        monkeypatch.setattr(results.os, "write", write)
        assert path.read_bytes() == whole
    append_line(path, {"clip": 2})
    assert [line["clip"] for line in read_lines(path)] == [0, 2]


def test_a_disk_that_is_full_leaves_what_stood_and_says_so(tmp_path, monkeypatch, fake):
    clip = np.zeros((2, 16, 16, 3), np.float32)
    write_lines(tmp_path / "s.jsonl", [{"clip": 0}])

    def full(*_, **__):
        raise FULL

    for owner, name, file, work in (
        (Path, "write_text", "s.jsonl", lambda: write_lines(tmp_path / "s.jsonl", [{"clip": 1}])),
        (PIL.Image.Image, "save", "a.png", lambda: keep(tmp_path / "frames" / "a.png", clip, {})),
        (reference.np, "savez", ".npz", lambda: reference.dense_run(CountedModel(), 0, 2, tmp_path / "cache")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(ConfigError, match=rf"{re.escape(file)}.*\(No space left"):
                work()
    assert [line["clip"] for line in read_lines(tmp_path / "s.jsonl")] == [0]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["s.jsonl"]
