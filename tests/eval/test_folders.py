"""Clips that other engines wrote: paired, refused by name, measured against the loss of their own encoding, judged."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import imageio.v2 as imageio
import numpy as np
import plain_diffusers
import pytest
from dit_accel_eval.runs.clip_files import clips_in, encoder_like, form_of
from dit_accel_eval.runs.pairing import pair, read_rows
from dit_accel_eval.runs.results import read_lines
from dit_accel_eval.suites import folders as measuring
from dit_accel_pipelines.generation.media import write_media
from fake_model import command, drawn, report_of, told
from PIL import Image

from dit_accel.adapters.embedded import assets

ERRORS = {"reference": 0, "slow": 4, "middle": 9, "worse": 12, "quick": 20, "mine": 3}
SECONDS = {"reference": 10, "slow": 8, "middle": 6, "worse": 7, "quick": 2, "mine": 4}


@pytest.fixture
def engine(tmp_path: Path) -> dict[str, Path]:
    """Folders of six pictures each, off by so many levels, and a table of the seconds that they took."""
    for name, error in ERRORS.items():
        (tmp_path / name).mkdir()
        for seed in range(6):
            noise = np.random.default_rng([seed, error]).integers(-error - seed, error + seed + 1, (24, 24, 3))
            picture = np.clip(100 + 20 * seed + noise * (error > 0), 0, 255).astype(np.uint8)
            Image.fromarray(picture).save(tmp_path / name / f"a kite-{seed}.png")
    rows = [f"{name},{seconds}" for name, seconds in SECONDS.items()]
    (tmp_path / "times.csv").write_text("\n".join(["folder,seconds", *rows]))
    return {name: tmp_path / name for name in ERRORS}


def folders(engine: dict[str, Path], *more, arms=("mine",), rivals=("slow", "middle", "worse", "quick")):
    named = [f"--{what}={name}={engine[name]}" for what, names in (("arm", arms), ("rival", rivals)) for name in names]
    page = engine["reference"].parent / "page.html"
    return command("folders", "--reference", engine["reference"], *named, "-o", page, "-m", "ms-ssim", *more)


def test_arms_are_held_against_the_curve_of_rivals_at_equal_time(engine, tmp_path, monkeypatch):
    run = partial(folders, engine, "--times", tmp_path / "times.csv", "--no-frames")
    done = run()
    assert done.exit_code == 0
    assert done.stderr.endswith(f"written: {tmp_path}/page.jsonl, and to share {tmp_path}/page.json\n")
    report = report_of(tmp_path / "page.jsonl")
    assert report.comparison.curve == pytest.approx({"quick": 0.2, "middle": 0.6, "slow": 0.8})
    psnr = {line.key: line.psnr for line in report.results.lines}
    leads = [psnr["mine", clip] - (psnr["quick", clip] + psnr["middle", clip]) / 2 for clip in range(6)]
    (mine,) = report.judged
    assert [*report.leads(mine).values()] == pytest.approx(leads)
    assert mine.ahead["steps_in_time"].verdict == "ahead"
    rows = [line.split()[:3] for line in done.stdout.splitlines()]
    assert [row for row in rows if row[0] in ERRORS][:2] == [["mine", "0.40", "2.50"], ["slow", "0.80", "1.25"]]
    assert "not on it, since another is as near in less time: worse." in done.stderr
    page = (tmp_path / "page.html").read_text()
    assert "Speed-ups are over the reference." in page
    assert "--rival slow=DIR --rival middle=DIR --rival worse=DIR --rival quick=DIR --arm mine=DIR -o page.html" in page
    before = read_lines(tmp_path / "page.jsonl")
    assert {(line["prompt"], line["seed"] - line["clip"]) for line in before} == {("a kite", 0)}
    measured = Mock(wraps=measuring.measured_line)
    monkeypatch.setattr(measuring, "measured_line", measured)
    Image.new("RGB", (24, 24)).save(engine["slow"] / "a kite-3.png")  # what has changed is measured again, and no more
    run()
    assert [call.args[0].frames.max() for call in measured.call_args_list] == [0]
    assert [line["clip"] for line in read_lines(tmp_path / "page.jsonl") if line not in before] == [3]


def test_without_seconds_each_arm_is_held_against_each_rival(engine, tmp_path):
    done = folders(engine, arms=("mine", "middle"), rivals=("slow",))
    assert "| mine vs slow | +" in done.stdout
    assert "| middle vs slow | -" in done.stdout
    assert "| not known" in done.stdout
    assert "nan" not in done.stdout + (tmp_path / "page.html").read_text().split("<main")[1].split("<script")[0]
    assert len([*(tmp_path / "page.frames").rglob("*.png")]) == 24  # the reference's once
    same = command("diff", tmp_path / "page.jsonl", tmp_path / "page.json")
    assert same.stdout.count(" | same | ") == 2
    alone = folders({**engine, "reference": engine["slow"]}, "--quiet", arms=("mine",), rivals=())
    assert (alone.exit_code, alone.stdout) == (0, f"{tmp_path}/page.html\n")


def test_prompts_and_seeds_are_read_from_tables_side_cars_and_names(engine, tmp_path):
    one, two = engine["reference"], engine["mine"]
    for folder, name in ((one, "x"), (two, "y")):
        for number, path in enumerate(sorted(folder.iterdir())):
            path.rename(folder / f"{name}{number}.png") if number < 2 else path.unlink()
        for number in range(2):
            known = {"request": {"prompt": "a fox", "seed": 7 - number}, "seconds": 3}
            (folder / f"{name}{number}.json").write_text(json.dumps(known))
    (tmp_path / "table.csv").write_text("folder,file,prompt,seed\nmine,y1,a cat,1\nreference,x1.png,a cat,1\n")
    both, problems = pair({"reference": one, "mine": two}, read_rows(tmp_path / "table.csv"))
    assert problems == []
    for folder, name in zip(both, "xy", strict=True):
        clips = {key: (clip.file.name, clip.seconds) for key, clip in folder.clips.items()}
        assert clips == {("a fox", 7): (f"{name}0", 3), ("a cat", 1): (f"{name}1", 3)}
    (two / "y0.json").unlink()  # its name alone says nothing, or the reference's
    assert "'y' seed 0 (y0.png)" in pair({"reference": one, "mine": two}, read_rows(tmp_path / "table.csv"))[1][1]
    (two / "y0.png").rename(two / "x0.png")
    _, (untimed,) = pair({"reference": one, "mine": two}, read_rows(tmp_path / "table.csv"))
    assert untimed.endswith("; add --times FILE for: mine")


def test_all_that_keeps_clips_from_being_compared_is_said_by_name(engine, tmp_path):
    mine, slow = engine["mine"], engine["slow"]
    for seed in (0, 1):
        (mine / f"a kite-{seed}.png").unlink()
    Image.new("RGB", (24, 20)).save(mine / "a kite-2.png")
    Image.new("RGB", (24, 24)).save(mine / "a cat-9.png")
    (mine / "a kite-3.png").write_bytes(b"no picture")
    (mine / "more").mkdir()
    Image.new("RGB", (24, 24)).save(mine / "more" / "a kite-4.png")
    Image.new("RGB", (24, 24)).save(slow / "a kite-1.jpg")
    (slow / "a kite-1.png").unlink()
    (tmp_path / "quick2").mkdir()
    done = folders({**engine, "quick": tmp_path / "quick2"})
    assert f"error: quick: the folder {tmp_path}/quick2 holds no clips" in done.stderr
    (tmp_path / "times.csv").write_text("folder,seconds\nmine,4\nyours,3\n")
    done = folders(engine, "--times", tmp_path / "times.csv")
    lines = [line.removeprefix("error: ") for line in done.stderr.splitlines()]
    assert lines[0].startswith(f"mine: {mine}/a kite-3.png can't be read (")
    assert lines[1:] == [
        "mine has several clips of 'a kite' seed 4: a kite-4.png, more/a kite-4.png",
        "rows of a table are of no clip here: {'folder': 'yours', 'seconds': 3.0}",
        "slow has clips that are not encoded as slow's first, lossless: a kite-1.jpg (jpeg)",
        "mine lacks clips of the reference: 'a kite' seed 0, 'a kite' seed 1, 'a kite' seed 3",
        "mine has clips that the reference lacks: 'a cat' seed 9 (a cat-9.png)",
        "mine has clips of other sizes than the reference's (frames of height x width): a kite-2.png (1 of 20 x 24, "
        "the reference's 1 of 24 x 24)",
        "seconds are known of some clips, not of all; add --times FILE for: reference, slow, middle, worse, quick",
    ]
    assert (done.exit_code, done.stdout, [*tmp_path.glob("page.*")]) == (2, "", [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arm", "mine"], "--arm takes NAME=DIR, got 'mine'"),
        (["--arm", "mine=other"], "'mine' names two folders"),
        (["--rival", "mine=other"], "'mine' names two folders"),
        (["--rival", "reference=other"], "'reference' names two folders"),
        (["--times", "none.csv"], "the table none.csv can't be read (No such file"),
        (["-o", "page.txt"], "the page must be a .html, got page.txt"),
        (["-m", "psnrr"], "there is no metric 'psnrr'"),
    ],
)
def test_options_that_can_not_be_meant_are_refused(engine, arguments, message):
    done = folders(engine, *arguments)
    assert (done.exit_code, message in told(done)) == (2, True)


@pytest.mark.parametrize("suffix", ["mp4", "jpg", "webp"])
def test_lossy_clips_are_measured_against_the_loss_of_their_own_encoding(tmp_path, suffix):
    for seed in range(1 + (suffix != "mp4")):
        clip = drawn(seed, frames=5)[: 5 if suffix == "mp4" else 1]
        for folder in ("exact", "encoded"):
            (tmp_path / folder).mkdir(exist_ok=True)
        exact, encoded = tmp_path / "exact" / f"{seed}", tmp_path / "encoded" / f"{seed}.{suffix}"
        if suffix == "mp4":
            ffv1 = {"format": "FFMPEG", "codec": "ffv1", "pixelformat": "bgr0", "macro_block_size": 1}
            imageio.mimwrite(exact.with_suffix(".mkv"), [*clip], **ffv1)
            write_media(encoded, clip, fps=8)
        else:
            Image.fromarray(clip[0]).save(exact.with_suffix(".png"))
            Image.fromarray(clip[0]).save(encoded, quality=50)
    run = partial(command, "folders", "-o", tmp_path / "p.html", "--reference")
    done = run(tmp_path / "exact", f"--arm=a={tmp_path}/encoded")
    assert done.exit_code == 0, done.stderr
    lines = read_lines(tmp_path / "p.jsonl")
    for line in lines:  # the clip is the reference, encoded: it is as near as its encoding lets it be
        assert line["metrics"]["encoding-alone"] == pytest.approx(line["psnr"], abs=0.7)
    assert "Clips are encoded with loss, which alone leaves " in done.stderr
    assert "; most of the error is the encoding's of a." in done.stderr
    turned = run(tmp_path / "encoded", f"--arm=a={tmp_path}/exact")
    assert "reference has clips neither lossless nor all encoded as lossless: 0." in turned.stderr


def test_what_can_not_be_encoded_here_is_said(tmp_path):
    clip, video = drawn(0, frames=5), tmp_path / "a" / "0.gif"
    video.parent.mkdir()
    write_media(video, clip, fps=8)
    (file,) = clips_in(video.parent)
    assert (form_of(file).size, form_of(file).encoding) == ("5 of 64 x 64", "gif")
    assert encoder_like(file, form_of(file), clip) is None
    done = command("folders", "--reference", video.parent, f"--arm=a={video.parent}", "-o", tmp_path / "p.html")
    assert "How much is lost by encoding as gif is not known here." in done.stderr


@pytest.mark.slow
def test_clips_of_a_script_of_diffusers_alone_are_judged(tmp_path):
    script, model = Path(plain_diffusers.__file__), assets().model_path("wan-plain")
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, script, model, tmp_path], check=True, env=alone, capture_output=True)
    reference, *others, last = [f"{name}={tmp_path / name}" for name in plain_diffusers.RUNS]
    rivals = [f"--rival={other}" for other in others]
    page = tmp_path / "page.html"
    done = command("folders", "--reference", reference.partition("=")[2], *rivals, f"--arm={last}", "-o", page)
    assert done.exit_code == 0, done.stderr
    report = report_of(tmp_path / "page.jsonl")
    assert {line.prompt for line in report.results.lines} == {*plain_diffusers.PROMPTS}
    assert all(line.steps_in_time > 0 and line.metrics["encoding-alone"] > 20 for line in report.results.lines)
    assert (report.full_steps, [arm.name for arm in report.judged]) == (5, ["fbc"])
    assert report.comparison.curve
    assert (tmp_path / "page.media").is_dir()
