"""`eval vbench --official`: the package in an environment of its own, by one of the same layout that reads no video."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from dit_accel_eval.vbench import official
from fake_model import command, told

from dit_accel import ConfigError

FULL_INFO = [
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
    "vbench/__init__.py": PACKAGE, "vbench/VBench_full_info.json": json.dumps(FULL_INFO),
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
    for entry in FULL_INFO:
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
    found, _, text = start(videos, ready, "--custom", "-d", "color")
    assert (found.exit_code, "color can't be measured of videos of one's own" in text) == (2, True)


def test_what_can_not_be_measured_is_refused_with_the_packages_last_line(videos, ready, tmp_path):
    found, _, text = start(videos, ready, "-d", "motion_smoothness")
    assert (found.exit_code, "motion_smoothness can't be measured: RuntimeError: AMT is not here" in text) == (2, True)
    (videos / "a red circle-3.mp4").unlink()
    found, calls, text = start(videos, ready, "-d", "subject_consistency")
    assert (found.exit_code, "lacks 1 of 5: 'a red circle-3.mp4'" in text, calls) == (2, True, [])
    found, _, text = start(videos, videos, "-d", "subject_consistency")
    assert (found.exit_code, f"{videos} is no virtual environment" in text) == (2, True)
    for option in (["--samples", "3"], ["--generate"]):
        found, _, text = start(videos, ready, *option)
        assert (found.exit_code, f"which has no {option[0]}; leave one out" in text) == (2, True)


def test_an_environment_of_another_version_is_refused(tmp_path):
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
