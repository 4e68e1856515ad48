"""A search for heads over two processes: the clips are shared out, none twice, and the first process writes alone."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from dit_accel_pipelines.processes.ranks import Ranks
from typer.testing import CliRunner

from dit_accel import ConfigError
from dit_accel.cli.app import app
from dit_accel.errors import UnsupportedModel

SEARCH = [
    "tune", "heads", "--model", "wan-plain", "--objective", "objective:brightness",
    "--per-round", "2", "--num-inference-steps", "2", "--num-frames", "5", "--height", "32", "--width", "32",
    "--prompt", "a red circle",
]  # fmt: skip


def test_one_process_does_all_jobs_in_order():
    ranks, seen = Ranks(), []
    ranks.spread([3, 1, 2], lambda job: 10 * job, lambda job, made: seen.append((job, made)))
    assert seen == [(3, 30), (1, 10), (2, 20)]
    assert ranks.shared(lambda: "lines") == "lines"
    assert (ranks.rank, ranks.count, ranks.first) == (0, 1, True)


def test_a_failure_in_one_process_is_raised_in_all(monkeypatch):
    """The others wait for its result, so it must reach them."""
    ranks = Ranks()
    ranks.rank, ranks.count = 1, 2
    monkeypatch.setattr(ranks, "_gathered", lambda value: [(None, ConfigError("no number")), value])
    with pytest.raises(ConfigError, match="no number"):
        ranks.spread(["a", "b"], lambda job: job, lambda job, made: None)
    with pytest.raises(ConfigError, match="no number"):
        ranks.shared(lambda: "unused")
    with pytest.raises(ConfigError, match="no number"):
        ranks.together(lambda: "this one's")


def test_the_others_hear_of_a_failure_of_this_one(monkeypatch):
    ranks, told = Ranks(), []
    monkeypatch.setattr(ranks, "_gathered", lambda value: told.append(value) or [(None, None), value])

    def fail():
        raise UnsupportedModel("no such model")

    with pytest.raises(UnsupportedModel, match="such model"):
        ranks.together(fail)
    assert [str(error) for _, error in told] == ["no such model"]
    assert ranks.together(lambda: 3) == 3
    assert told[1] == (None, None)  # what it made stays here


def test_other_methods_are_tuned_in_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = CliRunner().invoke(app, ["tune", "lite"])
    assert told.exit_code == 2
    assert "tune lite runs in one process, and 2 were launched" in told.stderr


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
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launched = subprocess.run(
        [*launch, "--main_process_port", str(port), "-m", "dit_accel", *SEARCH, "-o", str(output), "--json"],
        env={**os.environ, "PYTHONPATH": str(support), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr[-3000:]
    found = json.loads(launched.stdout)  # of one process alone
    kept = [tmp_path / f"{name}.json.progress.json" for name in ("heads", "alone")]
    parts, once = (json.loads(path.read_text())["prompts"] for path in kept)
    judged = [(tuple(part["heads"]), part["prompt"]) for part in parts]
    assert len(judged) == len(set(judged)) == found["clips"] == 30
    assert [part | {"score": pytest.approx(part["score"], rel=1e-4)} for part in once] == parts
    assert json.loads(output.read_text())["heads"] == json.loads(alone.stdout)["heads"]
