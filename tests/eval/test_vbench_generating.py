"""`dit-accel eval vbench --generate`: each video of another seed, the cost first, going on, shares, and refusals."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from dit_accel_eval.vbench.generating import own_pieces, read_augmented, share_of_work, video_pieces
from dit_accel_eval.vbench.prompts import first_of, read_full_info
from fake_model import command, told
from tiny_vbench import frames_of

from dit_accel import ConfigError

PROMPTS = [
    "a red circle moving right on a navy background",
    "a green square moving left on a gray background",
    "a blue cross moving up on a black background",
]
FULL_INFO = [
    {"prompt_en": PROMPTS[0], "dimension": ["subject_consistency", "dynamic_degree"]},
    {"prompt_en": PROMPTS[1], "dimension": ["temporal_flickering"]},
    {"prompt_en": PROMPTS[2], "dimension": ["subject_consistency"]},
]


SMALL = ("--num-frames", 5, "--num-inference-steps", 1)


@pytest.fixture
def info(tmp_path) -> Path:
    (tmp_path / "info.json").write_text(json.dumps(FULL_INFO))
    return tmp_path / "info.json"


def making(info: Path, *arguments: str | Path):
    videos = info.parent / "videos"
    found = command("vbench", "--videos", videos, "--generate", "--full-info", info, *SMALL, *arguments)
    return found, videos, told(found)


def test_every_video_has_a_seed_of_its_own_whatever_is_asked_for(info, tmp_path):
    every = read_full_info(info)
    names = ["subject_consistency", "temporal_flickering"]
    whole = video_pieces(every, every, names, tmp_path, None, 100)
    assert [len([one for one in whole if one.prompt == text]) for text in PROMPTS] == [5, 25, 5]
    assert len({one.seed for one in whole}) == len(whole)
    assert whole[0].path == tmp_path / f"{PROMPTS[0]}-0.mp4"
    part = video_pieces(every, first_of(every, ["subject_consistency"], 1), ["subject_consistency"], tmp_path, 2, 100)
    assert part == whole[:2]
    last = video_pieces(every, [every[2]], ["subject_consistency"], tmp_path, None, 100)
    assert last == whole[-5:]


def test_augmented_prompts_are_shown_and_the_videos_called_by_vbenchs(info, tmp_path):
    every = read_full_info(info)
    file = tmp_path / "augmented.txt"
    file.write_text("".join(f"{text}, in a very large picture\n" for text in PROMPTS))
    augmented = read_augmented(file, every)
    found = video_pieces(every, every, ["subject_consistency", "temporal_flickering"], tmp_path, None, 0, augmented)
    assert [one.seed for one in found] == [*range(5), *range(100_000, 100_025), *range(200_000, 200_005)]
    assert {one.prompt for one in found} == {*augmented}
    assert found[7].path == tmp_path / f"{PROMPTS[1]}-2.mp4"
    (one,) = video_pieces(every, [every[2]], ["subject_consistency"], tmp_path, 1, 7, augmented)
    assert (one.prompt, one.seed) == (augmented[2], 200_007)
    file.write_text(f"{PROMPTS[0]}\n")
    with pytest.raises(ConfigError, match=r"augmented.txt has 1 augmented prompts, and VBench 3"):
        read_augmented(file, every)
    refused, _, text = making(info, "--augmented", file, "--prompts", file)
    assert (refused.exit_code, "leave --prompts out" in text) == (2, True)


def test_augmented_videos_are_made_and_others_of_their_names_are_refused(info, tmp_path):
    file = tmp_path / "augmented.txt"
    file.write_text("".join(f"{text.replace('moving', 'moving quickly')}\n" for text in PROMPTS))
    arguments = ("-d", "dynamic_degree", "--samples", 1)
    found, videos, _ = making(info, *arguments, "--augmented", file)
    assert found.exit_code == 0, found.stderr
    (path,) = videos.glob("*.mp4")
    assert path.name == f"{PROMPTS[0]}-0.mp4"
    assert " moving quickly " in json.loads(path.with_suffix(".mp4.json").read_text())["prompt"]
    found, _, text = making(info, *arguments)
    assert (found.exit_code, "was made with prompt 'a red circle moving quickly" in text) == (2, True)


def test_prompts_of_ones_own_need_no_protocol(tmp_path):
    file, videos = tmp_path / "p.txt", tmp_path / "own"
    file.write_text(f"{PROMPTS[2]}\n{PROMPTS[0]}\n")
    start = partial(command, "vbench", "--videos", videos, "--generate", "--prompts", file, "--samples", 1, *SMALL)
    found = start()
    assert found.exit_code == 0, found.stderr
    assert sorted(path.name for path in videos.glob("*.mp4")) == [f"{PROMPTS[at]}-0.mp4" for at in (2, 0)]
    assert f"--videos {videos} --custom" in told(found)
    assert [one.seed for one in own_pieces(("a", "b", "a"), tmp_path, None, 3)] == list(range(3, 13))
    file.unlink()
    found = start()
    assert (found.exit_code, "--prompts " in found.stderr) == (2, True)
    for prompt, why in (("cats/dogs", "holds a slash"), ("a cat " * 50, "more than 249 bytes")):
        with pytest.raises(ConfigError, match=why):
            own_pieces((prompt,), tmp_path, 1, 0)


def test_shares_are_the_whole_work_once(info, tmp_path):
    every = read_full_info(info)
    work = video_pieces(every, every, ["subject_consistency"], tmp_path, None, 0)
    shares = [share_of_work(work, f"{number}/4") for number in range(4)]
    assert sorted(one.path for part in shares for one in part) == sorted(one.path for one in work)
    for wrong in ("4/4", "1", "a/b", "-1/4"):
        with pytest.raises(ConfigError, match=r"--shard.*i/n"):
            share_of_work(work, wrong)
    with pytest.raises(ConfigError, match=r"nothing.*2 videos"):
        share_of_work(work[:2], "3/4")


def test_videos_are_made_once_with_the_cost_told_first(info):
    arguments = ("-d", "subject_consistency", "--samples", 2, "--subset", 1, "--radial")
    found, videos, text = making(info, *arguments)
    assert found.exit_code == 0, found.stderr
    cost = "2 of 2 videos to make, 0 are there; num_frames 5, height 64, width 64, num_inference_steps 1"
    assert text.index(cost) < text.index("video 1 of 2") < text.index("to go")
    paths = [videos / f"{PROMPTS[0]}-{number}.mp4" for number in range(2)]
    one, two = (frames_of(path) for path in paths)
    assert one.shape == (5, 64, 64, 3)
    assert not np.array_equal(one, two)
    record = json.loads((videos / f"{PROMPTS[0]}-1.mp4.json").read_text())
    assert (record["seed"], list(record["methods"])) == (1, ["radial"])
    paths[1].unlink()
    before = paths[0].stat().st_mtime_ns
    found, _, text = making(info, *arguments)
    assert "1 of 2 videos to make, 1 are there" in text
    assert paths[0].stat().st_mtime_ns == before
    assert np.array_equal(frames_of(paths[1]), two)
    found, _, text = making(info, *arguments)
    assert (found.exit_code, "0 of 2 videos to make, 2 are there" in text) == (0, True)
    found, _, text = making(info, *arguments[:-1])
    assert (found.exit_code, f"{PROMPTS[0]}-0.mp4 was made with methods" in text) == (2, True)
    (videos / f"{PROMPTS[0]}-0.mp4.json").unlink()
    assert "has no side-car that tells how it was made; move it away" in making(info, *arguments)[2]
