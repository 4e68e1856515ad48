"""`eval vbench --protocol`: published measures by independent re-computation, their averages, their refusals."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from dit_accel_eval.metrics import perceptual
from dit_accel_eval.vbench import protocols
from dit_accel_eval.vbench.protocols import MEASURES, PROTOCOLS, of_batches, of_clips, of_finite_frames
from dit_accel_pipelines.generation.media import write_media
from PIL import Image
from typer.testing import CliRunner

from dit_accel.cli.app import app


def pair(frames: int = 2, height: int = 13, width: int = 15, spread: int = 30, seed: int = 0):
    rng = np.random.default_rng(seed)
    clip = rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    noise = rng.integers(-spread, spread + 1, clip.shape)
    return clip, np.clip(clip.astype(int) + noise, 0, 255).astype(np.uint8)


def test_psnr_is_that_of_each_frame_infinite_or_100_where_equal():
    clip, reference = pair()
    reference[1] = clip[1]
    error = sum((int(a) - int(b)) ** 2 for a, b in zip(clip[0].ravel(), reference[0].ravel(), strict=True))
    expected = 10 * math.log10(255**2 / (error / clip[0].size))
    assert MEASURES["psnr"](clip, reference).tolist() == [pytest.approx(expected), math.inf]
    assert MEASURES["psnr_capped"](clip, reference).tolist() == [pytest.approx(expected), pytest.approx(100)]


def test_wrapped_psnr_wraps_differences_and_squares_at_256_and_so_hardly_falls():
    clip, reference = pair(spread=120)
    wrapped = [((int(a) - int(b)) % 256) ** 2 % 256 for a, b in zip(clip[0].ravel(), reference[0].ravel(), strict=True)]
    expected = 20 * math.log10(255 / math.sqrt(sum(wrapped) / len(wrapped)))
    assert MEASURES["psnr_wrapped"](clip, reference)[0] == pytest.approx(expected)
    assert MEASURES["psnr_wrapped"](clip[:1], clip[:1] + np.uint8(16))[0] == math.inf  # 16 x 16 wraps to 0
    noise, other = (np.random.default_rng(seed).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8) for seed in (1, 2))
    assert MEASURES["psnr"](noise, other)[0] < 8
    assert 27 < MEASURES["psnr_wrapped"](noise, other)[0] < 29  # the floor that published tables stand on


def ssim_by_hand(x: np.ndarray, y: np.ndarray, window: np.ndarray, *, padded: bool, sample: bool) -> float:
    """Return SSIM of one frame in 0..255, place by place."""
    half, found = len(window) // 2, []
    more = window.size / (window.size - 1) if sample else 1.0
    for colour in range(3):
        one, two = (frame[..., colour].astype(float) / 255 for frame in (x, y))
        if padded:
            one, two = (np.pad(frame, half) for frame in (one, two))
        for top in range(one.shape[0] - 2 * half):
            for left in range(one.shape[1] - 2 * half):
                a, b = (frame[top : top + len(window), left : left + len(window)] for frame in (one, two))
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a = more * ((window * a * a).sum() - mean_a**2)
                var_b = more * ((window * b * b).sum() - mean_b**2)
                both = more * ((window * a * b).sum() - mean_a * mean_b)
                found.append((2 * mean_a * mean_b + 1e-4) * (2 * both + 9e-4)
                             / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4)))  # fmt: skip
    return float(np.mean(found))


GAUSS = np.outer(*2 * [np.exp(-np.square(np.arange(-5, 6)) / 4.5)])
GAUSS /= GAUSS.sum()


@pytest.mark.parametrize(
    ("measure", "window", "padded", "sample"),
    [
        ("ssim_box", np.full((11, 11), 1 / 121), True, False),
        ("ssim_gauss", GAUSS, False, False),
        ("ssim_gauss_padded", GAUSS, True, False),
        ("ssim_skimage", np.full((7, 7), 1 / 49), False, True),
    ],
)
def test_ssim_is_that_of_its_window(measure, window, padded, sample):
    clip, reference = pair()
    expected = [ssim_by_hand(*one, window, padded=padded, sample=sample) for one in zip(clip, reference, strict=True)]
    assert MEASURES[measure](clip, reference).tolist() == pytest.approx(expected, abs=1e-12)
    assert MEASURES[measure](clip, clip).tolist() == pytest.approx([1, 1])


def test_ssim_skimage_is_scikit_images():
    metrics = pytest.importorskip("skimage.metrics")
    clip, reference = pair(1, 40, 33)
    expected = metrics.structural_similarity(clip[0], reference[0], channel_axis=2)
    assert MEASURES["ssim_skimage"](clip, reference)[0] == pytest.approx(expected, abs=1e-12)


@pytest.fixture
def nets(monkeypatch) -> dict[str, dict[str, torch.Tensor]]:
    """Random weights of few channels in LPIPS' networks' places."""
    made = {}
    shapes = {"alex": [(3, 11), (4, 5), (4, 3), (4, 3), (4, 3)], "vgg": [(3 if at == 0 else 4, 3) for at in range(13)]}
    for net, convolutions in shapes.items():
        chance = torch.Generator().manual_seed(len(net))
        held = {f"head.{at}": torch.rand(1, 4, 1, 1, generator=chance) for at in range(5)}
        for at, (wide, side) in enumerate(convolutions):
            held[f"conv.{at}.weight"] = torch.randn(4, wide, side, side, generator=chance) / side
            held[f"conv.{at}.bias"] = torch.randn(4, generator=chance) / 10
        made[f"lpips-{net}"] = held
    monkeypatch.setattr(protocols, "tensors", made.__getitem__)
    monkeypatch.setattr(protocols, "missing", lambda net: None)
    return made


def test_lpips_is_the_projects_own_but_for_what_is_odd(nets):
    clip, reference = pair(9, 64, 80)  # more than go through the network at once
    one, two = (torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255 for frames in (clip, reference))
    own = perceptual.lpips(one, two, nets["lpips-alex"], "alex")
    assert MEASURES["lpips_alex"](clip, reference).tolist() == pytest.approx(own.tolist(), rel=1e-5)
    own = perceptual.lpips((one + 1) / 2, (two + 1) / 2, nets["lpips-vgg"], "vgg")  # what 2 x - 1 turns into [0, 1]
    assert MEASURES["lpips_vgg_unscaled"](clip, reference).tolist() == pytest.approx(own.tolist(), rel=1e-4)
    maps = protocols.lpips_maps(2 * one - 1, 2 * two - 1, nets["lpips-alex"], "alex")
    whole = sum(
        torch.nn.functional.interpolate(layer, size=(64, 80), mode="bilinear", align_corners=False) for layer in maps
    )
    assert MEASURES["lpips_alex_spread"](clip, reference).tolist() == pytest.approx(
        whole.mean((1, 2, 3)).tolist(), rel=1e-5
    )
    assert abs(float(whole.mean()) - float(sum(layer.mean() for layer in maps))) > 1e-6


def test_means_are_over_clips_batches_or_finite_frames():
    rng = np.random.default_rng(0)
    values = [rng.random(3) for _ in range(17)]
    means = [float(one.mean()) for one in values]
    assert of_clips(values) == pytest.approx(sum(means) / 17)
    assert of_batches(values) == pytest.approx((sum(means[:16]) / 16 + means[16]) / 2)  # the 17th weighs as 16 do
    assert of_finite_frames([np.array([1.0, math.inf]), np.array([2.0, 3.0, 4.0])]) == 2.5
    assert of_finite_frames([np.array([math.inf])]) is None
    assert of_clips([np.array([1.0, math.inf]), np.array([1.0])]) == math.inf


def test_every_protocol_tells_its_flaws():
    assert list(PROTOCOLS) == ["svg", "teacache", "cache-dit", "fastvideo"]
    assert all(len(one.flaws) > 3 for one in PROTOCOLS.values())


def compare(tmp_path: Path, name: str, *more: str):
    arguments = ["eval", "vbench", "--videos", tmp_path / "fast", "--reference", tmp_path / "dense", "--protocol", name,
                 "-o", tmp_path / "out", *more]  # fmt: skip
    found = CliRunner().invoke(app, [str(one) for one in arguments])
    return found, " ".join(found.stderr.split())


def write_pictures(tmp_path: Path, *pairs: tuple[np.ndarray, np.ndarray]) -> None:
    for name in ("fast", "dense"):
        (tmp_path / name).mkdir(exist_ok=True)
    for place, (one, two) in enumerate(pairs):
        Image.fromarray(one[0]).save(tmp_path / "fast" / f"img_{place}.png")
        Image.fromarray(two[0]).save(tmp_path / "dense" / f"img_{place}.png")


def test_a_folder_of_pictures_is_held_against_its_reference(tmp_path, nets):
    one, two = pair(1, 40, 48, spread=90, seed=1), pair(1, 40, 48, seed=2)
    write_pictures(tmp_path, one, two, (one[0], one[0]))
    found, text = compare(tmp_path, "cache-dit", "--json")
    assert found.exit_code == 0, text
    told = json.loads(found.stdout)
    wrapped = [float(MEASURES["psnr_wrapped"](*both)[0]) for both in (one, two)]
    assert told["scores"]["psnr"] == pytest.approx(np.mean(wrapped))  # the equal one is left out
    right = [float(MEASURES["psnr"](*both)[0]) for both in (one, two)]
    assert told["beside"]["psnr@skimage"] == pytest.approx(np.mean(right))
    assert told["scores"]["psnr"] > told["beside"]["psnr@skimage"]
    assert told["scores"]["lpips"] == pytest.approx(
        np.mean([MEASURES["lpips_alex"](*both)[0] for both in (one, two)]) * 2 / 3
    )
    assert any("wrap at 256" in flaw for flaw in told["flaws"])
    assert told["left_out"] == {}
    written = json.loads((tmp_path / "out" / "fast_cache-dit.json").read_text())
    assert [len(clip["psnr"]) for clip in written["by_clip"]] == [1, 1, 1]
    plain = compare(tmp_path, "cache-dit")[0].stdout
    assert f"{told['scores']['psnr']:.4f}" in plain
    assert "of cache-dit: PSNR's 8-bit differences and squares wrap at 256" in plain


def test_videos_are_cut_or_refused_by_the_protocols_rule(tmp_path, nets):
    frames = np.random.default_rng(0).integers(0, 256, (11, 64, 64, 3), dtype=np.uint8)
    for name, count in (("fast", 11), ("dense", 9)):
        (tmp_path / name).mkdir()
        write_media(tmp_path / name / "a kite-0.mp4", frames[:count], fps=8)
    found, text = compare(tmp_path, "fastvideo", "--json")
    assert found.exit_code == 0, text
    assert "1 of 1 clips were compared up to the shorter one's end, as fastvideo does" in text
    assert set(json.loads(found.stdout)["scores"]) == {"psnr", "ssim", "lpips"}
    found, text = compare(tmp_path, "teacache")
    assert found.exit_code == 2
    assert "has 11 frames, its reference 9, and teacache compares clips of one length" in text
    found, text = compare(tmp_path, "cache-dit", "--json")
    assert "cache-dit has LPIPS of pictures alone" in json.loads(found.stdout)["left_out"]["lpips"]


def test_equal_clips_are_infinitely_near_by_svg_and_100_by_teacache(tmp_path, nets):
    one, _ = pair(1, 40, 48)
    write_pictures(tmp_path, (one, one))
    assert json.loads(compare(tmp_path, "svg", "--json")[0].stdout)["scores"]["psnr"] == "infinite"
    assert json.loads(compare(tmp_path, "teacache", "--json")[0].stdout)["scores"]["psnr"] == pytest.approx(100)
    assert json.loads(compare(tmp_path, "cache-dit", "--json")[0].stdout)["scores"]["psnr"] is None


def test_wrong_comparisons_are_refused(tmp_path, nets):
    write_pictures(tmp_path, pair(1, 40, 48))
    (tmp_path / "dense" / "img_9.png").write_bytes((tmp_path / "dense" / "img_0.png").read_bytes())
    assert "1 references have no clip and are not looked at, such as 'img_9'" in compare(tmp_path, "svg")[1]
    for arguments, text in (
        (["--protocol", "svg"], "a comparison takes a reference and a protocol; add --reference, the dense clips"),
        (["--reference", str(tmp_path)], "add --protocol, such as svg"),
        (["--reference", str(tmp_path), "--protocol", "tecache"], "no protocol 'tecache'; did you mean 'teacache'"),
    ):
        found = CliRunner().invoke(app, ["eval", "vbench", "--videos", str(tmp_path / "fast"), *arguments])
        assert found.exit_code == 2
        assert text in " ".join(found.stderr.split())
    assert "color is measured without a reference" in compare(tmp_path, "svg", "-d", "color")[1]
    assert "make them first, then compare" in compare(tmp_path, "svg", "--generate")[1]
    Image.fromarray(pair(1, 48, 40)[0][0]).save(tmp_path / "dense" / "img_0.png")
    assert "has frames of 48 x 40 pixels, its reference of 40 x 48" in compare(tmp_path, "svg")[1]
    (tmp_path / "dense" / "img_0.png").unlink()
    found, text = compare(tmp_path, "svg")
    assert (found.exit_code, "has no reference called 'img_0'" in text) == (2, True)
