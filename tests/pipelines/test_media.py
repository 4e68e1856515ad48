"""Videos and images: what is in the files; what can't be written or read is told before a model is loaded."""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import dit_accel_pipelines.generation.generate as generation
import imageio_ffmpeg
import numpy as np
import pytest
from dit_accel_eval.suites import running
from dit_accel_pipelines.generation import media, side_by_side, ui
from fake_model import ARM, HEAD
from PIL import Image
from skimage import data
from typer.testing import CliRunner

from dit_accel import files
from dit_accel.attachment import check
from dit_accel.cli.app import app
from dit_accel.errors import ConfigError
from dit_accel.files import written_whole


@pytest.fixture
def frames() -> np.ndarray:
    """Nine frames of 64 x 48, a bright block moving right on blue."""
    video = np.zeros((9, 48, 64, 3), np.uint8)
    video[..., 2] = 90
    for index, frame in enumerate(video):
        frame[16:32, 6 * index : 6 * index + 16] = (250, 220, 40)
    return video


def near(read: list[Image.Image], frames: np.ndarray) -> bool:
    assert [(one.mode, one.size) for one in read] == [("RGB", (64, 48))] * 9
    return np.abs(np.stack([np.asarray(one) for one in read]).astype(float) - frames).mean() < 6


@pytest.mark.parametrize(
    ("suffix", "fps", "codec"), [(".mp4", 8, "h264"), (".mp4", 23.976, "h264"), (".webm", 12, "vp9")]
)
def test_videos_keep_size_rate_and_pictures(tmp_path: Path, frames, suffix: str, fps: float, codec: str):
    path = tmp_path / f"a{suffix}"
    media.write_media(path, frames, fps=fps)
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    assert (meta["size"], meta["fps"], meta["codec"]) == ((64, 48), pytest.approx(fps, abs=0.01), codec)
    assert meta["pix_fmt"].startswith("yuv420p")
    assert near(media.read_video(path), frames)


def test_gif_and_png_keep_frames_and_time(tmp_path: Path, frames):
    media.write_media(tmp_path / "a.gif", frames, fps=10)
    with Image.open(tmp_path / "a.gif") as image:
        assert (image.n_frames, image.size, image.info["duration"]) == (9, (64, 48), 100)
    assert near(media.read_video(tmp_path / "a.gif"), frames)
    media.write_media(tmp_path / "a.png", frames[:1], fps=8)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), frames[0])
    media.write_media(tmp_path / "b.png", frames, fps=8)
    assert Image.open(tmp_path / "b.png").size == media.contact_sheet([frames]).size


def test_a_folder_holds_every_frame_and_takes_the_place_of_frames_alone(tmp_path: Path, frames):
    folder, others = tmp_path / "frames", tmp_path / "others"
    for count in (9, 4):
        media.check_output(folder)
        with media.whole_output(folder) as temporary:
            media.write_media(temporary, frames[:count], fps=8)
        names = [f"{number:05d}.png" for number in range(1, count + 1)]
        assert sorted(path.name for path in folder.iterdir()) == names
    assert np.array_equal(np.asarray(Image.open(folder / "00004.png")), frames[3])
    with pytest.raises(ConfigError), media.whole_output(folder) as temporary:
        media.write_media(temporary / "00001.avi", frames, fps=8)
    assert len(list(folder.iterdir())) == 4
    others.mkdir()
    (others / "letter.txt").touch()
    with pytest.raises(ConfigError, match=r"/others .*letter.txt.*frame"):
        media.check_output(others)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frames", "others"]


@pytest.mark.parametrize("suffix", media.CODECS)
def test_quality_is_bought_with_size(tmp_path: Path, suffix: str):
    photograph, path, sizes = data.chelsea()[None, :224, :224], tmp_path / f"a{suffix}", []
    for quality in (1, None, 10):
        media.write_media(path, photograph, fps=8, quality=quality)
        sizes.append(path.stat().st_size)
    assert sizes[0] < 0.5 * sizes[1] < sizes[1] < 0.7 * sizes[2]
    media.check_quality(path, 5)
    with pytest.raises(ConfigError, match=r"quality 5 .*\.webm.*a\.gif"):
        media.check_quality(Path("a.gif"), 5)


def test_a_contact_sheet_shows_every_video(frames):
    sheet = np.asarray(media.contact_sheet([frames, frames[:, ::-1]], ["dense", "radial, 30.1 dB"], columns=3))
    assert sheet.shape[0] == 2 * (96 + 4) + 4
    blue = (sheet == (0, 0, 90)).all(axis=-1)
    columns = blue[10].nonzero()[0]
    runs = np.split(columns, np.where(np.diff(columns) > 1)[0] + 1)
    assert [len(run) for run in runs] == [128, 128, 128]
    assert (sheet[:, : columns[0]] < 100).any()  # the labels, before the first frame


def test_what_cannot_be_written(tmp_path: Path, frames):
    for write, message in (
        (lambda: media.contact_sheet([frames, frames[:, :20]]), r"contact sheet.*same size, got"),
        (lambda: media.contact_sheet([frames, frames], ["one"]), r"one label.*got 1 for 2"),
        (lambda: media.check_output(Path("a.avi")), r"a.avi.*'.avi'.*.mp4"),
        (lambda: media.check_output(Path(".mp4")), r"output .mp4 ends in ''"),
        (lambda: media.check_output(Path("%04d.png")), r"%04d.png is a pattern.*frames/"),
        (lambda: media.check_output(tmp_path / "none" / "a.gif"), r"none/a.gif.*none .*folder"),
        (lambda: media.write_media(Path("a.avi"), frames, fps=1), r"a.avi.*'.avi'"),
        (
            lambda: media.write_media(tmp_path / "a.mp4", frames[:, :, :63], fps=8),
            r"H.264.*got 63 x 48.*--scale 2, .gif",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            write()
    media.check_output(tmp_path / "a.mp4")


FAILING = [
    ("echo disk full >&2; exit 7", r"exit code 7.*disk full"),
    ("cat > /dev/null; exit 1", r"exit code 1.*no reason"),
    ("kill -9 $$", r"exit code -9.*no reason"),
]


@pytest.mark.parametrize(("script", "message"), FAILING)
def test_a_failing_ffmpeg_is_an_error_and_leaves_the_old_file(tmp_path: Path, frames, monkeypatch, script, message):
    ffmpeg, path = tmp_path / "ffmpeg", tmp_path / "a.mp4"
    ffmpeg.write_text(f"#!/bin/sh\n{script}\n")
    ffmpeg.chmod(0o755)
    path.write_bytes(b"old")
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(ffmpeg))
    with pytest.raises(RuntimeError, match=message), written_whole(path) as temporary:
        media.write_media(temporary, frames.repeat(8, axis=1), fps=8)  # more than a pipe holds
    assert path.read_bytes() == b"old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.mp4", "ffmpeg"]


def test_pictures_are_read_upright_and_in_colour(tmp_path: Path, frames):
    image = Image.fromarray(frames[0]).convert("RGBA")
    turned = Image.Exif()
    turned[0x0112] = 6  # "to be shown a quarter turn clockwise"
    image.save(tmp_path / "a.png", exif=turned)
    read = media.read_image(tmp_path / "a.png")
    assert (read.mode, read.size) == ("RGB", (48, 64))
    assert np.array_equal(np.asarray(read), np.rot90(frames[0], -1))


@pytest.mark.parametrize(("read", "what"), [(media.read_image, r"image file.*\.png"), (media.read_video, "video file")])
def test_pictures_that_cannot_be_read(tmp_path: Path, read, what):
    kind = read.__name__.removeprefix("read_")
    with pytest.raises(ConfigError, match=rf"{kind} .*none.mp4.*\(No such file.*{what}"):
        read(tmp_path / "none.mp4")
    (tmp_path / "bad.mp4").write_text("no picture")
    with pytest.raises(ConfigError, match=rf"{kind} .*bad.mp4.*\(.+\).*{what}"):
        read(tmp_path / "bad.mp4")


# Before the first step

PROMPT = "a red circle"
MP4 = ["generate", PROMPT, "-o", "a.mp4"]
PAGE = ["eval", "compare", "--easycache", "--prompt", PROMPT, "-o", "a.html"]

Break = Callable[[pytest.MonkeyPatch, Path], object]


class ReachedError(Exception):
    """The model would have been loaded."""


def no_encoder(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setenv("IMAGEIO_FFMPEG_EXE", "/nonexistent")


def encoder(script: str, mode: int = 0o755) -> Break:
    def lay(patch: pytest.MonkeyPatch, folder: Path) -> None:
        path = folder.parent / "ffmpeg"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(mode)
        patch.setenv("IMAGEIO_FFMPEG_EXE", str(path))

    return lay


def little_room(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(files.shutil, "disk_usage", lambda folder: SimpleNamespace(free=50_000))


def peft(found: str) -> Break:
    return lambda patch, folder: patch.setattr(importlib.metadata, "version", lambda name: found)


def no_drawing(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(check, "drawing", lambda name: None)


FAULTS: dict[str, tuple[list[str], Break, str]] = {
    "no encoder": (MP4, no_encoder, "a.mp4 needs ffmpeg with libx264 (/nonexistent: No such file or directory); pi"),
    "no encoder of WebM": (
        [*MP4[:-1], "a.webm"], no_encoder, "a.webm needs ffmpeg with libvpx-vp9 (/nonexistent: No such file"
    ),
    "a quality of what has none": ([*MP4[:-1], "a.gif", "--quality", "5"], lambda *_: None, "quality 5 is for .mp4"),
    "an encoder that may not run": (MP4, encoder("exit 0", 0o644), "/ffmpeg: Permission denied); pip install imageio"),
    "an encoder without H.264": (
        MP4, encoder("echo \"Unknown encoder 'libx264'\" >&2; exit 1"), "1 and wrote no video: Unknown encoder 'libx2"
    ),
    "a page's encoder": (PAGE, no_encoder, "the page's clips need ffmpeg with libx264"),
    "the ui's encoder": (["ui"], no_encoder, "the page needs ffmpeg with libx264"),
    "the ui's drawing": (["ui"], no_drawing, "check needs a package that compares clips"),
    "a full disk": (MP4, little_room, "the output takes about 86.4 kB, and "),
    "a disk too small for all prompts": (
        ["generate", "--prompt-file", "p.txt", "-o", "a.gif"], little_room, "5 outputs take about 676 kB, and "
    ),
    "no room for results": (
        ["eval", "run", "s.toml", "--out", "s.jsonl"], little_room, "a dense run, which is kept in 16 bits, takes about"
    ),
    "no room for frames": (PAGE, little_room, "the frames of 1 run take about 139 kB, and "),
    "the ui's room": (["ui"], little_room, "the clips of a run take about "),
    "an old peft": ([*MP4, "--lora", "a.safetensors"], peft("0.16.2"), "a LoRA needs peft 0.17 or newer, found 0.16.2"),
    "a kernel backend": ([*MP4, "--radial", "--backend", "fa4"], lambda *_: None, "kernel backend 'fa4' needs "),
    "a method": ([*MP4, "--model", "flux-tiny", "--radial"], lambda *_: None, "radial makes no sense on flux"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_would_end_a_run_is_told_before_a_model_is_loaded(tmp_path: Path, monkeypatch, fault: str):
    def reached(*_: object, **__: object) -> None:
        raise ReachedError

    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name, text in (("p.txt", f"{PROMPT}\n" * 5), ("s.toml", HEAD + ARM), ("a.safetensors", "")):
        (here / name).write_text(text)
    for module, name in ((generation, "load_pipeline"), (side_by_side, "load_pipeline"), (running, "_loaded")):
        monkeypatch.setattr(module, name, reached)
    monkeypatch.setattr(ui, "_require_gradio", lambda: None)
    arguments, break_it, message = FAULTS[fault]
    before = sorted(here.iterdir())
    break_it(monkeypatch, here)
    found = CliRunner().invoke(app, arguments)
    assert message in " ".join(found.stderr.split())
    assert (found.exit_code, found.stdout) == (2, "")
    assert found.stderr.splitlines()[-1].startswith("error: ")
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize("suffix", media.SUFFIXES)
def test_photographs_take_about_the_room_that_is_asked_for(tmp_path: Path, suffix: str):
    path, clip = tmp_path / f"a{suffix}", data.chelsea()[None, :224, :224]
    media.write_media(path, clip, fps=8)
    least = media.expected_size(path, frames=1, height=224, width=224)
    assert 0.5 * least < path.stat().st_size < 1.2 * least
