"""Files: what is in them, and that they appear whole or not at all."""

import stat
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from dit_accel_pipelines.media import check_output, contact_sheet, to_uint8, upscale, write_media, written_whole
from PIL import Image

from dit_accel.errors import ConfigError


@pytest.fixture
def frames() -> np.ndarray:
    """Nine frames of 64 x 48, a bright block moving right on blue."""
    video = np.zeros((9, 48, 64, 3), np.uint8)
    video[..., 2] = 90
    for index, frame in enumerate(video):
        frame[16:32, 6 * index : 6 * index + 16] = (250, 220, 40)
    return video


def test_mp4_keeps_size_rate_and_pictures(tmp_path: Path, frames):
    path = tmp_path / "a.mp4"
    write_media(path, frames, fps=8)
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    assert (meta["size"], meta["fps"], meta["codec"]) == ((64, 48), 8, "h264")
    assert meta["pix_fmt"].startswith("yuv420p")
    read = np.stack([np.frombuffer(frame, np.uint8).reshape(48, 64, 3) for frame in reader])
    assert read.shape == frames.shape
    assert np.abs(read.astype(float) - frames).mean() < 6


def test_odd_sizes_are_no_mp4(tmp_path: Path, frames):
    with pytest.raises(ConfigError, match=r"H.264 needs even sizes, got 63 x 48; use --scale 2, .gif or .png"):
        write_media(tmp_path / "a.mp4", frames[:, :, :63], fps=8)


def test_gif_keeps_frames_and_time(tmp_path: Path, frames):
    write_media(tmp_path / "a.gif", frames, fps=10)
    with Image.open(tmp_path / "a.gif") as image:
        assert (image.n_frames, image.size, image.info["duration"]) == (9, (64, 48), 100)


def test_png_is_one_frame_or_a_sheet(tmp_path: Path, frames):
    write_media(tmp_path / "a.png", frames[:1], fps=8)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), frames[0])
    write_media(tmp_path / "b.png", frames, fps=8)
    assert Image.open(tmp_path / "b.png").size == contact_sheet([frames]).size


def test_a_contact_sheet_shows_every_video(frames):
    sheet = np.asarray(contact_sheet([frames, frames[:, ::-1]], ["dense", "radial, 30.1 dB"], columns=3))
    assert sheet.shape[0] == 2 * (96 + 4) + 4
    blue = (sheet == (0, 0, 90)).all(axis=-1)
    columns = blue[10].nonzero()[0]
    runs = np.split(columns, np.where(np.diff(columns) > 1)[0] + 1)
    assert [len(run) for run in runs] == [128, 128, 128]
    assert (sheet[:, : columns[0]] < 100).any()  # the labels, before the first frame


def test_bad_contact_sheets(frames):
    with pytest.raises(ConfigError, match="a contact sheet needs videos of one size, got"):
        contact_sheet([frames, frames[:, :20]])
    with pytest.raises(ConfigError, match="a contact sheet needs a label a video, got 1 for 2"):
        contact_sheet([frames, frames], ["one"])


def test_an_error_leaves_no_file_and_keeps_the_old_one(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def interrupted() -> None:
        with written_whole(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


def test_a_file_takes_its_place_with_ordinary_rights(tmp_path: Path):
    path = tmp_path / "a.txt"
    with written_whole(path) as temporary:
        assert temporary.suffix == ".txt"
        temporary.write_text("new")
    assert path.read_text() == "new"
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_outputs_that_cannot_be_written(tmp_path: Path, monkeypatch):
    with pytest.raises(ConfigError, match=r"output a.avi ends in '.avi'; use one of .mp4, .gif, .png"):
        check_output(Path("a.avi"))
    with pytest.raises(ConfigError, match=r"can't be written: .*none is no folder; create it first"):
        check_output(tmp_path / "none" / "a.mp4")
    (tmp_path / "b.mp4").mkdir()
    with pytest.raises(ConfigError, match="can't be written: it is a folder; name a file in it"):
        check_output(tmp_path / "b.mp4")

    def refused(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    with pytest.raises(ConfigError, match="can't be written: Permission denied; choose another folder"):
        check_output(tmp_path / "a.mp4")
    with pytest.raises(ConfigError, match=r"output a.avi ends in '.avi'"):
        write_media(Path("a.avi"), np.zeros((1, 2, 2, 3), np.uint8), fps=1)


def test_numbers():
    assert to_uint8(np.array([-1.0, 0.0, 0.5, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]
    assert upscale(np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1), 2)[0, :, :, 0].tolist() == [
        [0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3],
    ]  # fmt: skip
