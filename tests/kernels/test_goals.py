"""Goals are judged by the worst shape, printed beside prediction and measurement, and dropped where out of reach."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "kernels" / "bench"
sys.path.insert(0, str(BENCH))

import goals  # noqa: E402
from cards import CARDS  # noqa: E402
from mixes import read_table  # noqa: E402


def record(shape: str, candidate: str, density: float, seconds: float, **more) -> dict:
    device = "NVIDIA H100 80GB HBM3"
    found = {"kind": "time", "device": device, "shape": shape, "candidate": candidate, "density": density}
    return {**found, "seconds": seconds, **more}


# Times that a card might show, in seconds: 10 for all tiles, linear but for what the goals are about.
RECORDS = [
    *(record("wan-720p", "triton", d, 10 * d) for d in (0.1, 0.25, 0.27, 0.5, 1.0)),
    *(record("128k", "triton", d, 10 * d) for d in (0.1, 0.27, 1.0)),
    record("wan-720p", "sdpa-flash", 1.0, 8.1),
    record("wan-720p", "sdpa-cudnn", 1.0, 5.4),
    record("128k", "sdpa-efficient", 1.0, 4.0),
    record("wan-720p", "triton-kept", 0.27, 3.0),
    record("wan-720p", "triton-votes", 0.27, 3.03),
    record("wan-720p", "triton-routed", 0.1, 1.6, density_found=0.16),
    record("128k", "triton-routed", 0.1, 1.5, density_found=0.1),
    record("128k", "triton-backward", 0.27, 9.0),
    {"kind": "time", "device": "H100", "shape": "wan-480p", "candidate": "flex", "density": 0.27, "error": "no"},
    {"kind": "check", "ok": True},
]


def test_goals_are_judged_by_the_worst_shape():
    found = {goal.name: goal for goal in goals.goals(RECORDS)}
    values = {name: goal.measured for name, goal in found.items()}
    assert values["time over density x all-tiles time"] == pytest.approx(1.0)
    assert values["best SDPA over ours, wan-720p at 0.27"] == pytest.approx(2.0)
    assert values["best SDPA over ours, 128k at 0.1"] == pytest.approx(4.0)
    assert values["with votes over without"] == pytest.approx(1.01)
    assert values["with routing over without"] == pytest.approx(1.5)
    assert values["FlexAttention over ours"] is None
    assert values["backward over forward"] == pytest.approx(9 / 2.7)
    verdicts = {name: goal.verdict for name, goal in found.items()}
    assert verdicts["with votes over without"] == "met"
    assert verdicts["with routing over without"] == "MISSED"
    assert verdicts["best SDPA over ours, 128k at 0.1"] == "MISSED"
    assert verdicts["FlexAttention over ours"] == "not measured"
    assert verdicts["backward over forward"] == "no goal"
    assert all(goal.predicted is None for goal in found.values())


@pytest.mark.parametrize(
    ("less", "predicted", "measured", "verdict"),
    [
        (True, (1.05, 1.2), 1.08, "met"),
        (True, (1.2, 1.05), 1.3, "MISSED"),
        (True, (1.11, 1.2), 1.05, "dropped: out of reach"),
        (False, (1.0, 1.2), None, "not measured"),
        (False, (1.0, 1.05), 1.2, "dropped: out of reach"),
    ],
)
def test_a_goal_that_neither_end_of_the_prediction_reaches_is_none(less, predicted, measured, verdict):
    goal = goals.Goal(name="", limit=1.1, less=less, predicted=predicted, measured=measured)
    assert goal.verdict == verdict


def test_a_pooled_rest_of_small_tiles_can_not_be_had_for_a_tenth():
    """Tiles of 64 at density .1: 16 % more columns alone; of 128 it is 8 %."""
    name, table = "with pooled rest over without", read_table()
    for card in ("A100", "H100", "B200", "RTX 4090"):
        large, small = (
            next(goal for goal in goals.goals([], CARDS[card], table, block) if goal.name == name)
            for block in (128, 64)
        )
        assert small.best is not None
        assert small.best > 1.1
        assert small.verdict == "dropped: out of reach"
        assert large.best is not None
        assert large.best < small.best


def test_a_gradient_takes_more_than_three_and_a_half_forwards_of_products():
    """Seven products for two: 2.7 forwards, an earlier goal, can't be had where products are the bound."""
    found = {goal.name: goal for goal in goals.goals([], CARDS["RTX 4090"], read_table())}
    backward = found["backward over forward"]
    assert backward.limit is None
    assert backward.best is not None
    assert backward.best > 2.7


def run(*arguments: str) -> str:
    command = [sys.executable, str(BENCH / "goals.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_command_prints_goal_prediction_and_measurement(tmp_path):
    path = tmp_path / "gpu.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    bare, full = run("--card", "H100").splitlines(), run("--card", "H100", "--measured", str(path)).splitlines()
    assert bare[1].split() == ["goal", "predicted", "measured"]
    row = next(line for line in bare if line.startswith("with votes over without"))
    assert row.split()[4:6] == ["<=", "1.02"]
    assert row.endswith("not measured")
    row = next(line for line in full if line.startswith("with votes over without"))
    assert row.split()[-2:] == ["1.010", "met"]
    row = next(line for line in run("--card", "A100", "--measured", str(path)).splitlines() if "with votes" in line)
    assert row.endswith("not measured")
