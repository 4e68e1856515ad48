"""The metrics without networks, each against an independent oracle, and what they refuse."""

import json
import re
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
from dit_accel_assets.clips import clip_of, draw
from dit_accel_eval.metrics import Measured, Metric, NotMeasured, Sample, metric, metrics, scores
from dit_accel_eval.metrics import registered as registry
from dit_accel_eval.metrics.ffmpeg import filtered
from dit_accel_eval.metrics.flow import dis_flow, is_dynamic, is_static, warp_error
from dit_accel_eval.metrics.registered import check_names
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from typer.testing import CliRunner

from dit_accel import ConfigError
from dit_accel.cli.app import app


def drawn(frames: int = 9) -> np.ndarray:
    _, scene, _ = clip_of(3, frames=1, held_out=True)
    return draw(scene, 4 * -(-frames // 4) + 1)[:frames].astype(np.float32) / 255


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


def test_psnr_is_that_of_ffmpeg():
    clip = np.rint(drawn() * 255).astype(np.float32) / 255
    other = np.rint(noisy(clip) * 255).astype(np.float32) / 255
    grey_clip, grey_other = (one[..., :1].repeat(3, -1) for one in (clip, other))
    told = filtered(Sample(frames=grey_other, reference=grey_clip), "psnr=stats_file=log")
    luma = [float(found) for found in re.findall(r"mse_y:(\S+)", told)]
    grey = np.mean((255 * (other[..., 0] - clip[..., 0])) ** 2, axis=(1, 2)) * (219 / 255) ** 2
    assert luma == pytest.approx(grey, rel=0.02)


def test_psnr_of_changes_ignores_what_stays_and_sees_what_flickers():
    clip = 0.25 + drawn() / 2
    assert value("psnr-change", clip + np.float32(0.1), clip) == pytest.approx(100, abs=1)
    signs = np.where(np.arange(len(clip)) % 2, 0.05, -0.05).astype(np.float32)[:, None, None, None]
    assert value("psnr-change", clip + signs, clip) == pytest.approx(20, abs=1e-2)  # differences are off by 0.1
    with pytest.raises(NotMeasured, match=r"2 frames.*one"):
        value("psnr-change", clip[:1], clip[:1])


def test_ssim_is_that_of_scikit_image():
    clip, other = drawn(), noisy(drawn())
    options = dict(data_range=1, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    each = [structural_similarity(*pair, full=True, **options)[1].mean() for pair in zip(clip, other, strict=True)]
    found = metric("ssim")(Sample(frames=other, reference=clip))
    assert found.by_frame == pytest.approx(each, abs=3e-3)  # they mirror the border differently
    assert found.value == pytest.approx(np.mean(found.by_frame))


def test_ms_ssim_is_that_of_the_closed_form():
    one, two = flat(0.4, size=176), flat(0.6, size=176)
    light = (2 * 0.4 * 0.6 + 1e-4) / (0.4**2 + 0.6**2 + 1e-4)
    assert value("ms-ssim", one, two) == pytest.approx(light**0.1333, abs=5e-4)  # only the last scale sees light
    with pytest.raises(NotMeasured, match=r"161 pixels.*64"):
        value("ms-ssim", drawn(), drawn())


def test_vmaf_and_xpsnr_fall_with_noise():
    clip = drawn()
    assert value("xpsnr", clip, clip) == 100
    assert value("xpsnr", noisy(clip, 0.05), clip) > value("xpsnr", noisy(clip, 0.2), clip) + 3
    vmaf = [value("vmaf@v0.6.1", one, clip) for one in (clip, noisy(clip, 0.05), noisy(clip, 0.2))]
    assert vmaf[0] > 95 > vmaf[1] > vmaf[2]
    with pytest.raises(NotMeasured, match=r"VMAF.*16 pixels.*8"):
        value("vmaf@v0.6.1", flat(0.5, size=8), flat(0.5, size=8))


def test_xpsnr_of_equal_noise_everywhere_is_near_psnr():
    rng = np.random.default_rng(0)
    grey = (0.5 + 0.1 * rng.standard_normal((3, 128, 128, 1))).repeat(3, -1).astype(np.float32)
    other = grey + (0.02 * rng.standard_normal((3, 128, 128, 1))).repeat(3, -1).astype(np.float32)
    log = filtered(Sample(frames=other, reference=grey), "xpsnr=stats_file=log")
    luma = [float(found) for found in re.findall(r"XPSNR y: *(\S+)", log)]
    psnr = value("psnr", other, grey) - 20 * np.log10(219 / 255)  # in limited range
    assert np.mean(luma) == pytest.approx(psnr, abs=2.5)


def test_flickering_motion_sharpness_and_exposure_are_those_of_closed_forms():
    blinking = flat(*[0.4, 0.4 + 8 / 255] * 3)
    assert value("flickering", blinking) == pytest.approx(1 - 8 / 255, abs=1e-6)
    assert value("motion", blinking) == pytest.approx(8 / 255, abs=1e-6)
    assert value("flickering@static-dis", blinking) == pytest.approx(1 - 8 / 255, abs=1e-6)
    board = np.indices((16, 16)).sum(0) % 2
    checks = np.repeat(board[None, ..., None], 3, -1).astype(np.float32)
    assert value("sharpness", checks) == pytest.approx(16)  # the Laplacian is 4 and -4 by turns
    assert value("sharpness", flat(0.5)) == 0
    red = np.zeros((2, 16, 16, 3), np.float32)
    red[..., 0] = 1
    assert value("exposure", red) == pytest.approx(0.2126)
    assert value("clipping", red) == 0
    assert value("clipping", flat(0, 0.5, 1)) == pytest.approx(2 / 3)
    assert metric("exposure")(Sample(frames=flat(0, 1))).by_frame == (0, 1)


def test_flow_follows_a_texture_that_moves():
    clip = moving(3.0)
    inner = dis_flow(clip[0], clip[1])[16:-16, 16:-16]
    assert inner.reshape(-1, 2).mean(0) == pytest.approx([3, 0], abs=0.2)
    assert value("warp-error@dis", clip) < 0.01
    assert value("warp-error@dis", clip) < value("motion", clip) / 5
    apart = noisy(flat(0.5, 0.5, size=96), 0.2)
    assert value("warp-error@dis", apart) > 0.1
    assert [value("dynamic@dis", one) for one in (clip, moving(0.5))] == [1, 0]  # 6 pixels on 256 are 2.25 here
    assert [value("static@dis", one) for one in (clip, moving(0.2))] == [0, 1]
    assert value("static@dis", moving(0.8, frames=17)) == 0  # slow, but it goes far
    with pytest.raises(NotMeasured, match="clip moves"):
        value("flickering@static-dis", clip)
    with pytest.raises(NotMeasured, match=r"16 pixels.*8"):
        value("dynamic@dis", flat(0.5, 0.5, size=8))


def test_the_rules_of_motion_count_as_they_are_written():
    clip = flat(*[0.5] * 16, size=256)

    def flows(lengths):
        given = iter(lengths)
        return lambda one, two: np.full((256, 256, 2), next(given) / np.sqrt(2), np.float32)

    moved = [7.0] * 4 + [0.0] * 11
    assert is_dynamic(Sample(frames=clip), flows(moved)).value == 1  # 4 of 16 pairs by more than 6 pixels
    assert is_dynamic(Sample(frames=clip), flows([5.0] * 15)).value == 0
    assert is_dynamic(Sample(frames=clip), flows([7.0] * 3 + [0.0] * 12)).value == 0
    assert is_dynamic(Sample(frames=clip, fps=16), flows([7.0] * 2 + [0.0] * 5)).value == 1  # every other frame
    assert is_static(Sample(frames=clip), flows([4.0] * 2 + [0.0] * 13 + [11.0, 11.0])).value == 1
    assert is_static(Sample(frames=clip), flows([4.0] * 3 + [0.0] * 12)).value == 0
    assert is_static(Sample(frames=clip), flows([0.0] * 15 + [0.0, 13.0])).value == 0


def test_pixels_that_leave_the_frame_are_no_warp_error():
    clip = flat(0.2, 0.8, size=32)
    away = lambda one, two: np.full((32, 32, 2), 40.0, np.float32)  # noqa: E731
    assert warp_error(Sample(frames=clip), away).value == 1  # nothing is seen in both
    still = lambda one, two: np.zeros((32, 32, 2), np.float32)  # noqa: E731
    assert warp_error(Sample(frames=clip), still).value == pytest.approx(0.6, abs=1e-6)


def test_repeats_take_clips_longer_than_trained():
    clip = drawn(33)
    assert value("norepeat", np.concatenate([clip, clip]), trained_frames=33) == 0
    assert value("loop", clip, trained_frames=17) < 0.6
    assert scores(["loop", "norepeat"], Sample(frames=clip[:9], trained_frames=17)).skipped == {
        name: "it takes 16 frames, the opening and a later stretch, and there are 9" for name in ("loop", "norepeat")
    }


@pytest.mark.parametrize("name", sorted(name for name, one in metrics().items() if one.of is None))
def test_every_metric_says_what_it_is_and_takes_a_still_picture(name):
    one = metric(name)
    assert one.name == name
    assert all((one.words, one.source))
    found = scores([name], Sample(frames=drawn(1), reference=drawn(1) if one.reference else None))
    assert len(found.measured) + len(found.skipped) + len(found.unavailable) == 1
    if one.reference:
        with pytest.raises(NotMeasured, match=r"reference|not|pixels"):
            one(Sample(frames=drawn(2)))


NAN = drawn(3)
NAN[1, 4, 4, 0] = np.nan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(frames=NAN), r"finite.*1 of 3 frames.*frame 1"),
        (dict(frames=drawn(3), reference=NAN), r"reference.*finite"),
        (dict(frames=drawn(3) * 255), r"\[0, 1\], got 14 to 226"),
        (dict(frames=(drawn(3) * 255).astype(np.uint8)), r"floats in \[0, 1\], got uint8"),
        (dict(frames=drawn(3), reference=drawn(4)), r"shape.*got \(3, 64, 64, 3\).*reference"),
        (dict(frames=drawn(3)[0]), r"\[F, height, width, 3\].*F.*1, got \(64, 64, 3\)"),
        (dict(frames=drawn(3)[:0]), r"F.*1, got \(0, 64, 64, 3\)"),
        (dict(frames=[1]), "got list"),
        (dict(frames=drawn(3), fps=0), r"fps.*above 0, got 0"),
    ],
)  # fmt: skip
def test_what_is_no_sample_says_so(options, message):
    with pytest.raises(ConfigError, match=message):
        Sample(**options)


def test_unknown_metrics_are_told_with_the_nearest():
    with pytest.raises(ConfigError, match=r"metric 'pnsr'.*'psnr'"):
        check_names(["ssim", "pnsr"])
    with pytest.raises(ConfigError, match=r"metric 'ssim'.*twice"):
        check_names(["ssim", "ssim"])


def given(**changes) -> Metric:
    options = dict(name="mine", words="mine", better="more", bounds=(0.0, 1.0), reference=False, source="me")
    return Metric(**{**options, "measure": lambda sample: 0.5, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(better="up"), r"'mine'.*better = 'up'.*'more', 'less'.*'neither'"),
        (dict(name="my own"), r"metric.*'my own'"),
        (dict(bounds=(1.0, 0.0)), r"metric 'mine'.*bounds \(1.0, 0.0\)"),
    ],
)
def test_metrics_are_checked_when_they_are_made(changes, message):
    with pytest.raises(ConfigError, match=message):
        given(**changes)


def test_a_metric_that_breaks_its_word_is_told():
    sample = Sample(frames=drawn(2))
    for bad in (np.nan, 2.0):
        with pytest.raises(ConfigError, match=r"mine gave (nan|2.0).*0 to 1"):
            given(measure=lambda _, bad=bad: bad)(sample)
    assert given(measure=lambda _: Measured(value=1.0005))(sample).value == 1  # rounding is no breach
    assert scores(["psnr"], sample).skipped == {"psnr": "it compares with a reference, and there is none"}


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dit_accel_eval.metrics.psnr:PSNR", r"metric 'psnr'.*twice.*dit_accel_eval.metrics"),
        ("dit_accel_eval.metrics.psnr:NONE", r"stranger.*: module"),
        ("dit_accel_eval.metrics.nothing:NONE", r"stranger.*: No module"),
        ("dit_accel_eval.metrics.registered:METRIC_GROUP", "metrics, got 'd'"),
    ],
)
def test_entry_points_that_are_wrong_say_so(stranger, text, message):
    stranger[0] = entry(text)
    with pytest.raises(ConfigError, match=message):
        metrics()


def test_the_command_lists_them():
    found = CliRunner().invoke(app, ["eval", "metrics"])
    assert found.exit_code == 0
    assert all(name in found.stdout for name in ("psnr", "warp-error@dis", "vmaf@v0.6.1"))


def test_an_ffmpeg_without_a_filter_is_a_reason_to_skip(monkeypatch):
    from dit_accel_eval.metrics import ffmpeg

    monkeypatch.setattr(ffmpeg, "_filters", lambda: frozenset({"psnr"}))
    found = scores(["vmaf@v0.6.1", "xpsnr"], Sample(frames=drawn(), reference=drawn()))
    assert not found.measured
    assert found.unavailable["xpsnr"] == "the ffmpeg of imageio-ffmpeg has no filter xpsnr; update imageio-ffmpeg"


def test_an_ffmpeg_that_fails_tells_why():
    with pytest.raises(NotMeasured, match=r"ffmpeg.*measure it: \S"):
        filtered(Sample(frames=drawn(2), reference=drawn(2)), "nofilter=log")
