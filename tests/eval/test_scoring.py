"""Clips in files: paired by name, measured, and every bad file or folder told by name."""

import importlib
import json
import math
from functools import partial
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from dit_accel_eval.runs.results import keep, read_lines
from dit_accel_pipelines.generation.media import write_media
from fake_model import command, drawn, refuses
from PIL import Image
from scipy.linalg import sqrtm

from dit_accel.errors import install

score = partial(command, "score")


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Two folders of two clips each, kept without loss; the first's are 5 levels off where they can be."""
    for seed in (0, 1):
        clip = drawn(seed)
        for name, frames in (("own", np.clip(clip.astype(int) + 5, 0, 255)), ("dense", clip)):
            keep(tmp_path / name / "more" / f"{seed}.png", frames.astype(np.float32) / 255, {"seed": seed})
    return tmp_path / "own", tmp_path / "dense"


def test_folders_are_paired_by_name_and_measured(folders, tmp_path):
    own, dense = folders
    found = score(own, "--reference", dense, "-m", "psnr", "-m", "motion", "-o", tmp_path / "s.jsonl")
    assert (found.exit_code, found.stderr) == (0, "")
    lines = read_lines(tmp_path / "s.jsonl")
    assert [line["clip"] for line in lines] == ["more/0", "more/1"]
    for seed, line in enumerate(lines):
        off = np.clip(drawn(seed).astype(float) + 5, 0, 255) - drawn(seed)
        assert line["metrics"]["psnr"] == pytest.approx(-10 * math.log10((off**2).mean() / 255**2), abs=1e-2)
        assert len(line["by_frame"]["psnr"]) == 9
    assert "more/0" in found.stdout
    same = json.loads(score(dense / "more" / "0.png", "--reference", dense / "more" / "0.png", "--json").stdout)
    assert same[0]["metrics"] == {"psnr": 100, "ssim": pytest.approx(1)}


def test_lossy_files_are_warned_of_and_measured_alone_without_a_word(folders, tmp_path):
    write_media(tmp_path / "a.mp4", drawn(0), fps=8)
    compared = score(tmp_path / "a.mp4", "--reference", folders[1] / "more" / "0.png")
    assert compared.exit_code == 0
    assert "1 of the files are compressed with loss (a.mp4), which caps PSNR" in compared.stderr
    alone = score(tmp_path / "a.mp4", "--json")
    assert (alone.exit_code, alone.stderr) == (0, "")
    assert json.loads(alone.stdout)[0]["metrics"]["motion"] > 0
    for codec, pixels, lossy in (("ffv1", "bgr0", False), ("libx264", "yuv420p", True)):
        path = tmp_path / f"{codec}.mkv"
        imageio.mimwrite(path, [*drawn(0)], format="FFMPEG", codec=codec, pixelformat=pixels, macro_block_size=1)
        found = score(path, "--reference", folders[1] / "more" / "0.png", "--json")
        assert "compressed with loss" in found.stderr if lossy else found.stderr == ""
        assert (json.loads(found.stdout)[0]["metrics"]["psnr"] < 60) == lossy


def test_what_can_not_be_measured_is_told(folders, tmp_path):
    own, dense = folders
    (dense / "more" / "1.png").unlink()
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "bad").mkdir()
    broken, short = tmp_path / "bad" / "broken.mp4", tmp_path / "short.png"
    broken.write_bytes(b"no video")
    keep(short, drawn(0)[:5].astype(np.float32) / 255, {})
    cut, cut_kept = broken.with_name("cut.mp4"), broken.with_name("cut.png")  # as a copy that was stopped leaves them
    write_media(cut, drawn(0), fps=8)
    for path, whole in ((cut, cut.read_bytes()), (cut_kept, short.read_bytes())):
        path.write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for suffix in ("png", "jpg"):
        Image.fromarray(drawn(0)[0]).save(tmp_path / "two" / f"a.{suffix}")
    for arguments, message in (
        ([own, "--reference", dense], "has no reference called 'more/1'; did you mean 'more/0'"),
        ([tmp_path / "empty"], "holds no clips: no file that ends in .mp4"),
        ([tmp_path / "text.txt"], "is no clip: its name must end in"),
        ([tmp_path / "two"], "several clips called a, which differ in the suffix; rename one"),
        ([broken], "broken.mp4 can't be read ("),
        ([cut], "cut.mp4 can't be read ("),
        ([cut_kept], "cut.png can't be read ("),
        ([own, "-m", "psnr"], "psnr compares with a reference; name clips with --reference"),
        ([short, "--reference", own / "more" / "0.png"], "of one shape compare, got (5, 64, 64, 3) and a ref"),
    ):
        refuses(message, "score", *arguments)


def test_videos_of_which_frames_are_lost_are_not_measured_as_if_they_were_whole(tmp_path):
    video = tmp_path / "a.mkv"
    frames = [*drawn(0, frames=41)]
    imageio.mimwrite(video, frames, format="FFMPEG", macro_block_size=1, codec="ffv1", pixelformat="bgr0")
    whole, middle = video.read_bytes(), video.stat().st_size // 2
    for content in (whole[:middle] + bytes(400) + whole[middle + 400 :], whole[: int(0.9 * len(whole))]):
        video.write_bytes(content)
        found = score(video, "-m", "sharpness")
        assert (found.exit_code, found.stdout) == (2, "")
        assert "a.mkv is damaged or was cut off (" in found.stderr or "can't be read (" in found.stderr


class Means(torch.nn.Module):
    """Colours' means in Inception's place, of frames as 8 bits."""

    num_features = 3

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        assert frames.dtype == torch.uint8
        return frames.double().mean((2, 3))


def test_distances_of_folders_are_torchmetrics(folders, monkeypatch):
    own, dense = folders
    for kind in ("fid.FrechetInceptionDistance", "kid.KernelInceptionDistance"):
        made = getattr(importlib.import_module(f"torchmetrics.image.{kind[:3]}"), kind[4:])
        monkeypatch.setattr(f"torchmetrics.image.{kind}", partial(made, feature=Means()))
    result = score(own, "--reference", dense, "-m", "kid@inception", "-m", "fid@inception", "--json")
    found = json.loads(result.stdout)[-1]
    assert (found["clip"], found["frames"]) == (None, 18)
    assert "fid@inception of 18 frames is above that of many" in result.stderr
    one, two = (
        np.concatenate([change(drawn(seed).astype(int)).mean((1, 2)) for seed in (0, 1)])
        for change in (lambda clip: np.clip(clip + 5, 0, 255), lambda clip: clip)
    )
    spreads = [np.cov(one.T), np.cov(two.T)]
    fid = ((one.mean(0) - two.mean(0)) ** 2).sum() + np.trace(sum(spreads)) - 2 * np.trace(sqrtm(np.dot(*spreads)).real)
    assert found["metrics"]["fid@inception"] == pytest.approx(fid, rel=1e-3)
    kernels = [(x @ y.T / 3 + 1) ** 3 for x, y in ((one, one), (two, two), (one, two))]
    within = sum((kernel.sum() - kernel.trace()) / (18 * 17) for kernel in kernels[:2])
    assert found["metrics"]["kid@inception"] == pytest.approx(within - 2 * kernels[2].mean(), rel=1e-3)


def test_distances_need_a_library_and_references(folders, monkeypatch):
    assert "kid@inception compares with a reference" in score(folders[0], "-m", "kid@inception").stderr
    for module in ("fid", "kid"):
        monkeypatch.setattr(f"torchmetrics.image.{module}._TORCH_FIDELITY_AVAILABLE", False)
    said = f"kid@inception takes torch-fidelity; {install('eval')}"
    refuses(said, "score", folders[0], "--reference", folders[1], "-m", "kid@inception")
