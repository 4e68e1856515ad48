"""Prompts and searches that several processes share: none twice, none left out, a failure told to all."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import dit_accel_pipelines.generation.generate as generating
import generating_ranks
import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate.commands import launch
from dit_accel_pipelines.generation.batch import numbered
from dit_accel_pipelines.generation.request import Request
from dit_accel_pipelines.generation.side_car import Generation
from dit_accel_pipelines.generation.timing import Timings
from dit_accel_pipelines.processes.processes import Process, started_process
from dit_accel_pipelines.processes.ranks import Ranks
from parallel_ranks import processes
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from typer.testing import CliRunner

from dit_accel import ConfigError
from dit_accel.cli.app import app

PROMPTS = ("a red circle moving right", "a blue square going up", "a red circle", "a blue square", "a red square")
REFUSED = (
    "ulysses = 3 does not divide the 4 processes that were started",
    "ulysses = 4 does not divide the transformer's 2 heads; choose of 1, 2",
    "ulysses = 2 does not divide the transformer's 5 heads; choose of 1, 5",
)
SHORT = ["--num-inference-steps", "2", "--num-frames", "5", "--height", "32", "--width", "32"]


def requests(tmp_path: Path, count: int = len(PROMPTS), seed: int = 0, **changes: Any) -> list[Request]:
    values: dict[str, Any] = {"num_inference_steps": 1, "num_frames": 5, "height": 32, "width": 32, **changes}
    return [
        Request(prompt=prompt, output=output, seed=number, **values)
        for number, (prompt, output) in enumerate(
            zip(PROMPTS[:count], numbered(tmp_path / "a.gif", count), strict=True), seed
        )
    ]


@pytest.fixture
def loads(monkeypatch) -> list[Request]:
    """The requests for which a pipeline was loaded; what they make is black."""
    found, pipe = [], SimpleNamespace(scheduler=None)
    monkeypatch.setattr(generating, "load_pipeline", lambda asked: found.append(asked) or pipe)
    monkeypatch.setattr(generating, "_with_choices", lambda one, pipe: one)
    monkeypatch.setattr(generating, "prepare_larger", lambda *_: [])

    def run(pipe, one, **_):
        frames = np.zeros((5, 32, 32, 3), np.uint8)
        return Generation(prompt=one.prompt, frames=frames, timings=Timings(steps=[0.0]), report=None)

    monkeypatch.setattr(generating, "run", run)
    return found


def made(tmp_path: Path) -> dict[str, tuple[str, int]]:
    records = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    return {Path(record["output"]).name: (record["prompt"], record["seed"]) for record in records}


@pytest.mark.parametrize("count", [2, 3, 7])
def test_every_prompt_is_made_once_with_the_name_and_seed_it_has_alone(count, tmp_path: Path, loads):
    lines: list[str] = []
    for rank in range(count):
        process = Process(rank=rank, count=count)
        written = generating.generate(
            requests(tmp_path, seed=7), process=process, on_written=lambda one: lines.append(one.record["output"])
        )
        assert len(written) == len(PROMPTS[rank::count])
    assert made(tmp_path) == {f"a-0{n}.gif": (PROMPTS[n - 1], 6 + n) for n in range(1, 6)}
    assert sorted(lines) == [str(tmp_path / f"a-0{n}.gif") for n in range(1, 6)]
    assert len(loads) == min(count, len(PROMPTS))  # one that has no prompt loads nothing


def test_what_tells_the_same_request_is_kept_and_the_rest_made(tmp_path: Path, loads):
    asked = requests(tmp_path)
    generating.generate(asked)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    (tmp_path / "a-02.gif").unlink()
    (tmp_path / "a-03.gif.json").unlink()
    (tmp_path / "a-04.gif.json").write_text("{")
    lines: list[Any] = []
    written = generating.generate(asked, resume=True, on_written=lines.append)
    assert [one.kept for one in written] == [True, False, False, False, True]
    assert [one.record["prompt"] for one in written] == list(PROMPTS)
    assert len(lines) == 5
    untouched = [tmp_path / f"a-0{n}.gif{end}" for n in (1, 5) for end in ("", ".json")]
    assert all(path.stat().st_mtime_ns == before[path] for path in untouched)
    assert len(loads) == 2
    assert all(one.kept for one in generating.generate(asked, resume=True))
    assert len(loads) == 2
    assert not any(one.kept for one in generating.generate(asked))
    for changes in ({"seed": 1}, {"num_inference_steps": 2}, {"guidance_scale": 3.0}, {"negative_prompt": "a blue"}):
        generating.generate(requests(tmp_path, 1))
        assert not generating.generate(requests(tmp_path, 1, **changes), resume=True)[0].kept, changes


GIVEN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


def test_the_launchers_variables_and_that_each_process_takes_a_device_of_its_own():
    assert started_process({}) == Process()
    assert started_process({"RANK": "3"}) == Process()
    assert started_process(GIVEN) == Process(rank=5, count=8, local_rank=1, local_count=4)
    for variables, together, message in (
        ({**GIVEN, "RANK": "x"}, 1, r"variables.*got RANK=x, WORLD_SIZE=8"),
        ({**GIVEN, "RANK": "8"}, 1, "RANK=8 of WORLD_SIZE=8 and LOCAL_RANK=1 of LOCAL_WORLD_SIZE=4"),
        ({}, 2, r"ulysses = 2 .*processes, got 1"),
        ({}, 0, r"ulysses .*1 or more.*got 0"),
        ({"RANK": "3", "WORLD_SIZE": "4"}, 3, r"ulysses = 3.*torchrun --nproc-per-node 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            started_process(variables, together=together)
    shared = [Process(rank=rank, count=6, together=2) for rank in range(6)]
    assert [one.own(range(5)) for one in shared] == [[0, 3], [0, 3], [1, 4], [1, 4], [2], [2]]
    assert [one.first for one in shared] == [True, False] * 3
    one = Process(rank=5, count=8, local_rank=1, local_count=4)
    cards = mock.Mock(device_count=lambda: 4)
    with mock.patch.object(torch, "get_device_module", return_value=cards):
        assert one.device("cuda") == "cuda:1"
        with pytest.raises(ConfigError, match=r"--device cuda:2.*4 processes"):
            one.device("cuda:2")
        cards.device_count = lambda: 3
        with pytest.raises(ConfigError, match=r"4 processes.*3 cuda devices"):
            one.device("cuda")
    assert one.device("cpu") == "cpu"
    assert Process().device("cuda:2") == "cuda:2"


LAUNCHED = {"RANK": "0", "WORLD_SIZE": "2"}
CARDS: list[tuple[list[str], dict[str, str], str]] = [
    (["--gpus", "2"], {}, "gpus = 2, and there is no accelerator; --device cpu"),
    (["--gpus", "3", "--device", "cuda"], {}, "take a device each, and it has 2 cuda devices"),
    (["--gpus", "2", "--device", "cuda:1"], {}, "--device cuda:1 puts all 2 processes"),
    (["--gpus", "3", "--device", "cpu", "--ulysses", "2"], {}, "ulysses = 2 does not divide the 3 processes"),
    (["--gpus", "2", "--device", "cpu", "--json"], {}, "--json prints one document, and 2 processes"),
    (["--gpus", "2", "--device", "cpu", "--num-frames", "9999"], {}, "256 tokens along frames"),
    (["--gpus", "2"], {"WORLD_SIZE": "3"}, "gpus = 2 starts processes, and a launcher started 3"),
    (["--json"], LAUNCHED, "--json prints one document, and 2 processes would print as many"),
    (["tune", "lite"], LAUNCHED, "tune lite runs in one process, and 2 were launched"),
    (["--gpus", "0"], {}, "gpus must be from 1 to 1,024, got 0"),
    (["--cfg-parallel"], {}, "--cfg-parallel runs guidance's two forwards on two devices"),
]


@pytest.mark.parametrize(("words", "variables", "message"), CARDS)
def test_processes_that_cannot_run_are_refused_before_they_are_started(
    words, variables, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "launch_command", lambda arguments: 1 / 0)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with mock.patch.object(torch, "get_device_module", return_value=mock.Mock(device_count=lambda: 2)):
        result = CliRunner().invoke(app, words if words[0] == "tune" else ["generate", "a red circle", *words])
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("ended", "code", "said"), [(None, 0, ""), (2, 2, ""), (-9, 1, "process 1 of 2 .* SIGKILL")])
def test_a_command_that_starts_processes_ends_as_they_end(ended, code, said, tmp_path, monkeypatch):
    started = []

    def launch_command(arguments):
        started.extend([arguments.num_processes, *arguments.training_script_args])
        if ended:
            failure = mock.Mock(exitcode=ended, timestamp=0, local_rank=1, message="", error_file="")
            raise ChildFailedError("dit_accel", {1: failure})

    monkeypatch.setattr(launch, "launch_command", launch_command)
    monkeypatch.setattr(sys, "argv", ["dit-accel", *SPREAD])
    result = CliRunner().invoke(app, [*SPREAD, "-o", str(tmp_path / "a.gif")])
    assert (result.exit_code, started) == (code, [2, *SPREAD])
    assert re.search(said, result.stderr)
    assert bool(said) == bool(result.stderr)


SPREAD = ["generate", "a red circle", *SHORT, "--gpus", "2", "--device", "cpu"]


@pytest.mark.slow
def test_processes_that_a_command_starts_make_what_one_makes(tmp_path: Path):
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS[:3]))
    words = ["generate", "--prompt-file", str(tmp_path / "p.txt"), *SHORT, "--radial", "-o"]
    alone = CliRunner().invoke(app, [*words, str(tmp_path / "a.gif")])
    assert alone.exit_code == 0, alone.stderr
    command = [sys.executable, "-m", "dit_accel", *words, str(tmp_path / "b.gif"), "--gpus", "2", "--device", "cpu"]
    shared = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert shared.returncode == 0, shared.stderr[-3000:]
    assert sorted(shared.stdout.split()) == [str(tmp_path / f"b-0{n}.gif") for n in (1, 2, 3)]
    for n in (1, 2, 3):
        assert (tmp_path / f"a-0{n}.gif").read_bytes() == (tmp_path / f"b-0{n}.gif").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_groups_make_each_output_together(tmp_path: Path):
    for folder in ("alone", "shared"):
        (tmp_path / folder).mkdir()
    ranks = processes(4, generating_ranks.make, tmp_path, seconds=0)
    for rank in range(4):
        assert not isinstance(ranks[rank], str), ranks[rank]
        names = ["a-01.png", "a-03.png"] if rank < 2 else ["a-02.png"]
        resumed = [True, False] if rank < 2 else [True]
        lines = [(name, False) for name in names] + list(zip(names, resumed, strict=True))
        assert ranks[rank]["lines"] == ([] if rank % 2 else lines)  # the first of a group writes and tells
        assert ranks[rank]["seeds"] == ([0, 2] if rank < 2 else [1])
        assert ranks[rank]["kept"] == resumed
        for error, words in zip(ranks[rank]["refused"], REFUSED, strict=True):
            assert words in error
    assert ranks[0]["away"] <= 1  # of 255
    assert sorted(path.name for path in (tmp_path / "shared").glob("*.png")) == [f"a-0{n}.png" for n in (1, 2, 3)]


@pytest.mark.slow
def test_a_killed_process_leaves_whole_files_and_is_resumed(tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:3]))
    (tmp_path / "alone").mkdir()
    (tmp_path / "shared").mkdir()

    def start(folder: str, rank: int, count: int, *more: str) -> "subprocess.Popen[str]":
        command = ["generate", "--prompt-file", str(tmp_path / "prompts.txt"), *SHORT, "--radial", *more]
        return subprocess.Popen(
            [sys.executable, "-m", "dit_accel", *command, "-o", str(tmp_path / folder / "a.gif")],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(count), "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    def finished(process: "subprocess.Popen[str]") -> list[str]:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        return sorted(Path(line).name for line in out.splitlines())

    first, other = start("shared", 0, 2), start("shared", 1, 2)
    assert first.stdout is not None
    assert first.stdout.readline() == f"{tmp_path / 'shared' / 'a-01.gif'}\n"
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert finished(other) == ["a-02.gif"]
    standing = {path: path.stat().st_mtime_ns for path in (tmp_path / "shared").glob("a-*.gif")}
    assert finished(start("shared", 0, 2, "--resume")) == ["a-01.gif", "a-03.gif"]
    assert finished(start("alone", 0, 1)) == [f"a-0{n}.gif" for n in range(1, 4)]
    assert {path.stat().st_mtime_ns == time for path, time in standing.items()} == {True}
    for n in range(1, 4):
        assert (tmp_path / "shared" / f"a-0{n}.gif").read_bytes() == (tmp_path / "alone" / f"a-0{n}.gif").read_bytes()


SEARCH = [
    "tune", "heads", "--model", "wan-plain", "--objective", "objective:brightness",
    "--per-round", "2", "--num-inference-steps", "2", "--num-frames", "5", "--height", "32", "--width", "32",
    "--prompt", "a red circle",
]  # fmt: skip


def test_one_process_does_all_jobs_in_order_and_a_failure_in_one_is_raised_in_all(monkeypatch):
    """The others wait for its result, so it must reach them, and this one's reach the others."""
    ranks, seen, sent = Ranks(), [], []
    ranks.spread([3, 1, 2], lambda job: 10 * job, lambda job, made: seen.append((job, made)))
    assert seen == [(3, 30), (1, 10), (2, 20)]
    assert ranks.shared(lambda: "lines") == "lines"
    assert (ranks.rank, ranks.count, ranks.first) == (0, 1, True)
    ranks.rank, ranks.count = 1, 2
    monkeypatch.setattr(ranks, "_gathered", lambda value: [(None, ConfigError("no number")), value])
    for work in (
        lambda: ranks.spread(["a", "b"], lambda job: job, lambda job, made: None),
        lambda: ranks.shared(lambda: "unused"),
        lambda: ranks.together(lambda: "this one's"),
    ):
        with pytest.raises(ConfigError, match="no number"):
            work()
    monkeypatch.setattr(ranks, "_gathered", lambda value: sent.append(value) or [(None, None), value])
    with pytest.raises(ConfigError, match="WORLD_SIZE"):
        ranks.together(lambda: started_process({"RANK": "9", "WORLD_SIZE": "8"}))
    assert ranks.together(lambda: 3) == 3
    assert ["WORLD_SIZE" in str(error) for _, error in sent] == [True, False]
    assert sent[1] == (None, None)  # what it made stays here


@pytest.mark.slow
def test_accelerate_launch_shares_a_search(tmp_path):
    if not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    alone = CliRunner().invoke(app, [*SEARCH, "-o", str(tmp_path / "alone.json"), "--json"])
    assert alone.exit_code == 0, alone.stderr
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    output = tmp_path / "heads.json"
    support = Path(__file__).parents[1] / "support"
    launch = "-m accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --main_process_port"
    launched = subprocess.run(
        [sys.executable, *launch.split(), str(port), "-m", "dit_accel", *SEARCH, "-o", str(output), "--json"],
        env={**os.environ, "PYTHONPATH": str(support), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr[-3000:]
    found = json.loads(launched.stdout)  # of one process alone
    kept = [tmp_path / f"{name}.json.progress.json" for name in ("heads", "alone")]
    parts, once = ({str(point): score for point, (score,) in json.loads(path.read_text())["scores"]} for path in kept)
    assert len(parts) == found["clips"] == 30
    assert parts == pytest.approx(once, rel=1e-4)
    assert json.loads(output.read_text())["heads"] == json.loads(alone.stdout)["heads"]
