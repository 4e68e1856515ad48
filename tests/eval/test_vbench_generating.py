"""`dit-accel eval vbench`: videos with seeds of their own, and the package in an environment (--official)."""

import json
import os
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from dit_accel_eval.vbench import official
from dit_accel_eval.vbench.dimensions import first_of, read_full_info
from dit_accel_eval.vbench.generating import own_pieces, read_augmented, share_of_work, video_pieces
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


def test_every_video_has_a_seed_of_its_own_whatever_is_asked_for_and_shares_are_the_whole_work_once(info, tmp_path):
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
    every = read_full_info(info)
    work = video_pieces(every, every, ["subject_consistency"], tmp_path, None, 0)
    shares = [share_of_work(work, f"{number}/4") for number in range(4)]
    assert sorted(one.path for part in shares for one in part) == sorted(one.path for one in work)
    for wrong in ("4/4", "1", "a/b", "-1/4"):
        with pytest.raises(ConfigError, match=r"--shard.*i/n"):
            share_of_work(work, wrong)
    with pytest.raises(ConfigError, match=r"nothing.*2 videos"):
        share_of_work(work[:2], "3/4")


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
    with pytest.raises(ConfigError, match=r"augmented.txt has 1 prompts, and VBench 3"):
        read_augmented(file, every)
    assert "leave --prompts out" in making(info, "--augmented", file, "--prompts", file)[2]


def test_augmented_videos_are_made_and_others_of_their_names_are_refused(info, tmp_path):
    file = tmp_path / "augmented.txt"
    file.write_text("".join(f"{text.replace('moving', 'moving quickly')}\n" for text in PROMPTS))
    arguments = ("-d", "dynamic_degree", "--samples", 1)
    found, videos, _ = making(info, *arguments, "--augmented", file)
    assert found.exit_code == 0, found.stderr
    (path,) = videos.glob("*.mp4")
    assert path.name == f"{PROMPTS[0]}-0.mp4"
    assert " moving quickly " in json.loads(path.with_suffix(".mp4.json").read_text())["prompt"]
    assert "error: " in (text := making(info, *arguments)[2])
    assert "was made with prompt 'a red circle moving quickly" in text


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


@pytest.mark.slow
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


PACKAGED_INFO = [
    {"prompt_en": "a red circle", "dimension": ["subject_consistency", "motion_smoothness"]},
    {"prompt_en": "a still kite", "dimension": ["temporal_flickering"]},
]
PACKAGE = """
import json, os

class VBench:
    def __init__(self, device, full_info_dir, output_path):
        self.device, self.full_info, self.output = device, full_info_dir, output_path

    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False, read_frame=False,
                 mode="vbench_standard", **kwargs):
        (dimension,) = dimension_list
        if dimension == "motion_smoothness":
            raise RuntimeError("AMT is not here")
        videos = sorted(os.listdir(videos_path))
        entries = [{"video_path": os.path.join(videos_path, one), "video_results": 0.5} for one in videos]
        print(self.device, mode, local, prompt_list, os.environ.get("VBENCH_CACHE_DIR"), os.path.isfile(self.full_info))
        with open(os.path.join(self.output, "calls.txt"), "a") as file:
            file.write(f"{dimension} {self.device} {mode} {local} {prompt_list} {len(videos)}\\n")
        with open(os.path.join(self.output, name + "_eval_results.json"), "w") as file:
            json.dump({dimension: [0.25, entries]}, file)
"""
FILTER = """
import os, shutil
from vbench.utils import CACHE_DIR
DEVICE = "cuda"

def static_filter(args):
    to = os.path.join(args.result_path, "filtered_videos")
    os.makedirs(to)
    assert DEVICE == "cpu" and args.filter_scope == "temporal_flickering", DEVICE
    for name in sorted(os.listdir(args.videos_path))[-2:]:
        shutil.copy(os.path.join(args.videos_path, name), to)
"""
FILES = {
    "vbench/__init__.py": PACKAGE, "vbench/VBench_full_info.json": json.dumps(PACKAGED_INFO),
    "vbench/utils.py": "CACHE_DIR = ''\ndef init_submodules(names, local=False): pass\n",
    "vbench/cli/__init__.py": "", "vbench/cli/static_filter.py": FILTER,
    "torch.py": "device = str\n",
    "vbench-0.1.5.dist-info/METADATA": "Metadata-Version: 2.1\nName: vbench\nVersion: 0.1.5\n",
    "vbench-0.1.5.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "vbench-0.1.5.dist-info/RECORD": "",
}  # fmt: skip


def environment(at: Path, files: dict[str, str]) -> Path:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(at)], check=True)
    packages = next(at.glob("lib/python3*/site-packages"))
    for name, text in files.items():
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_text(text)
    return at


@pytest.fixture(scope="module")
def ready(tmp_path_factory) -> Path:
    return environment(tmp_path_factory.mktemp("environments") / "env", FILES)


@pytest.fixture
def videos(tmp_path) -> Path:
    at = tmp_path / "clips"
    at.mkdir()
    for entry in PACKAGED_INFO:
        for number in range(5):
            (at / f"{entry['prompt_en']}-{number}.mp4").touch()
            os.utime(at / f"{entry['prompt_en']}-{number}.mp4", (1, 1))
    return at


def start(videos: Path, env: Path, *arguments: str | Path):
    out = videos.parent / "out"
    found = command("vbench", "--videos", videos, "--official", env, "-o", out, "--device", "cpu", *arguments)
    calls = (out / "calls.txt").read_text().splitlines() if (out / "calls.txt").is_file() else []
    return found, calls, told(found)


def test_dimensions_are_measured_by_the_package_and_a_failed_one_is_left_out(videos, ready):
    names = ("subject_consistency", "motion_smoothness", "temporal_flickering")
    arguments = [part for name in names for part in ("-d", name)]
    found, calls, text = start(videos, ready, *arguments, "--folder", videos, "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["scores"] == {"subject_consistency": 0.25, "temporal_flickering": 0.25}
    assert "motion_smoothness is left out: RuntimeError: AMT is not here" in text
    assert calls == [
        "subject_consistency cpu vbench_standard True [] 10",
        "temporal_flickering cpu vbench_standard True [] 2",  # those that the filter let pass
    ]
    results = json.loads((videos.parent / "out" / "clips_official_eval_results.json").read_text())
    assert [(name, len(entries)) for name, (_, entries) in results.items()] == [(names[0], 10), (names[2], 2)]
    again, calls, text = start(videos, ready, *arguments[:2])
    assert "subject_consistency: is in " in text
    assert len(calls) == 2
    (videos / "a red circle-0.mp4").touch()  # a newer video is measured anew
    assert len(start(videos, ready, *arguments[:2])[1]) == 3
    assert again.exit_code == 0


def test_prompts_of_ones_own_go_to_the_package(videos, ready, tmp_path):
    prompts = {path.name: f"{path.stem} by night" for path in videos.iterdir()}
    (tmp_path / "p.json").write_text(json.dumps(prompts))
    found, calls, _ = start(videos, ready, "--custom", "--prompts", tmp_path / "p.json", "-d", "temporal_flickering")
    assert found.exit_code == 0, found.output
    assert calls[0].startswith("temporal_flickering cpu custom_input False {'a")
    assert "by night" in calls[0]
    assert calls[0].endswith(" 10")  # no filter for videos of one's own
    assert "error: color can't be measured of one's own videos" in start(videos, ready, "--custom", "-d", "color")[2]


def test_what_can_not_be_measured_is_refused_with_the_packages_last_line_and_another_version(videos, ready, tmp_path):
    (videos / "a red circle-3.mp4").rename(videos / "a red circle-9.mp4")
    for env, options, message in (
        (ready, ("-d", "motion_smoothness"), "lacks 1 of 5: 'a red circle-3.mp4'"),
        (videos, ("-d", "subject_consistency"), f"{videos} is no virtual environment"),
        (ready, ("--samples", "3"), "which has no --samples; leave one out"),
        (ready, ("--generate",), "which has no --generate; leave one out"),
    ):
        found, calls, text = start(videos, env, *options)
        assert (found.exit_code, message in text, calls) == (2, True, [])
    (videos / "a red circle-9.mp4").rename(videos / "a red circle-3.mp4")
    found, _, text = start(videos, ready, "-d", "motion_smoothness")
    assert (found.exit_code, "motion_smoothness can't be measured: RuntimeError: AMT is not here" in text) == (2, True)
    other = {name.replace("0.1.5", "0.1.4"): text.replace("Version: 0.1.5", "Version: 0.1.4")
             for name, text in FILES.items()}  # fmt: skip
    with pytest.raises(ConfigError, match=r"has vbench 0\.1\.4, and vbench==0\.1\.5"):
        official.interpreter(environment(tmp_path / "env", other), lambda text: None)


@pytest.mark.slow
def test_a_missing_environment_is_made_and_the_package_installed(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "vbench-0.1.5-py3-none-any.whl", "w") as wheel:
        for name, text in FILES.items():
            wheel.writestr(name, text)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    said: list[str] = []
    with pytest.raises(ConfigError, match=r"vbench==0\.1\.5.*env.*ERROR"):
        official.interpreter(tmp_path / "env", said.append)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    python, package = official.interpreter(tmp_path / "env", said.append)  # goes on with what is there
    assert (python.is_file(), package.name) == (True, "vbench")
    assert [text.split()[0] for text in said] == ["making", "installing", "installing"]
