"""`dit-accel doctor`: what it says of kernels that are right, wrong, slow or missing, and what plan makes of it."""

import json
from collections import Counter

import pytest
import torch
from dit_accel_kernels.choice import race
from dit_accel_kernels.choice.candidates import CANDIDATES, Candidate
from typer.testing import CliRunner

from dit_accel.cli.app import app
from dit_accel.estimate import examination, kept_races
from dit_accel.estimate.prediction import KERNEL_COST

CPU = torch.device("cpu")
RIGHT, FLAT = CANDIDATES["gather"].attend, CANDIDATES["reference"].attend
SECONDS = {"torch": 2.0, "gather": 4.0, "flex": 1.0, "dense": 8.0}
PLAN = ("plan", "--family", "wan2.1-1.3b", "--radial")


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A CPU on which every call takes the seconds above, with nothing kept; one kernel is wrong in bfloat16."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(race.SWITCH, raising=False)
    monkeypatch.setattr(examination, "SHAPES", {"cpu": (("wan-plain", 64, 64, 9), ("wan-plain", 64, 64, 17))})
    monkeypatch.setattr(examination, "FEATURES", ((), ("LSE",)))
    for module in (examination, kept_races):
        monkeypatch.setattr(module, "own_device", lambda: CPU)
    monkeypatch.setattr(
        race, "fault", lambda kind, attend, **_: "it is off" * (attend is FLAT and kind.dtype.itemsize == 2)
    )
    monkeypatch.setitem(CANDIDATES, "gather", Candidate(lambda x: None, FLAT))
    monkeypatch.setattr(race, "timed", lambda calls, problem: {name: SECONDS[name] for name in calls})
    monkeypatch.setitem(CANDIDATES, "torch", Candidate(lambda x: None, RIGHT))
    monkeypatch.setitem(CANDIDATES, "flex", Candidate(lambda x: None, RIGHT, waits=True))
    for name in ("triton", "cudnn"):
        monkeypatch.setitem(CANDIDATES, name, Candidate(lambda x: "needs a card", RIGHT, "triton", ("cuda",)))
    race.measured.cache_clear()
    yield
    race.measured.cache_clear()


def run(*words: str):
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "80"})


def doctor() -> dict:
    return json.loads(run("doctor", "--json").stdout)


def test_it_says_what_there_is_and_what_is_fastest():
    found = doctor()
    missing = {one["name"]: one["missing"] for one in found["candidates"]}
    assert (missing["triton"], missing["torch"]) == ("needs a card", None)
    assert missing["fa4"].startswith("needs a card of sm_90")
    counts = Counter(one["kernel"] for one in found["checks"])
    assert counts == {"torch": 8, "gather": 8, "flex": 2}  # what waits, in what is raced
    assert [(one["tokens"], one["dtype"]) for one in found["races"]][::2] == [(320, "float32"), (320, "bfloat16")]
    assert all(one["name"] == "flex" for one in found["races"])
    assert [one["seconds"].get("gather") for one in found["races"]] == [4.0, 4.0, None, None]
    text = run("doctor").stdout
    assert "right in 4 of 8 self checks; not used for bfloat16, head dim" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80
    assert "8 s   4.00    2.00  8.00" in text
    assert "doctor --json" in text


@pytest.mark.parametrize(("left", "checks", "races"), [(0, 0, 0), (10, 8, 0), (40, 8, 4), (100, 10, 4)])
def test_what_there_is_no_time_for_is_said(monkeypatch, left, checks, races):
    times = iter([left - 110.0 - 1e-3])  # the first look at the clock is at the start
    monkeypatch.setattr(examination.time, "monotonic", lambda: next(times, 0.0))
    found = doctor()
    assert sum(one["kernel"] != "gather" for one in found["checks"]) == checks
    assert sum("seconds" in one for one in found["races"]) == races
    assert all(("flex" in one["seconds"]) == (left == 100) for one in found["races"] if "seconds" in one)
    assert (" parts were not measured" in " ".join(found["notes"])) == (left < 100)


def test_nothing_is_measured_where_that_is_switched_off(monkeypatch):
    monkeypatch.setenv(race.SWITCH, "0")
    result = run("doctor")
    assert (result.exit_code, result.stdout.count("not checked")) == (0, 3)
    assert f"{race.SWITCH} is 0" in result.stderr


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (torch.OutOfMemoryError, 0)])
def test_what_to_install_and_races_that_end_early(monkeypatch, error, code):
    def fail(*_, **__):
        raise error("too large")

    monkeypatch.setitem(CANDIDATES, "torch", Candidate(lambda x: "backend 'torch' needs a compiler: use 'x'", RIGHT))
    monkeypatch.setitem(CANDIDATES, "cudnn", Candidate(lambda x: "needs the x package", RIGHT, on=("cuda",)))
    monkeypatch.setitem(CANDIDATES, "flex", Candidate(lambda x: "needs AVX2", RIGHT))
    monkeypatch.setattr(examination, "race_of", fail)
    result = run("doctor")
    assert result.exit_code == code
    assert ("not measured: too large" in result.stderr) == (code == 0)
    assert code or "To be faster:\n- torch needs a compiler\n\n" in result.stdout  # what would run here alone


def test_plan_and_recommend_count_by_what_was_measured(monkeypatch):
    def planned(*words: str) -> dict:
        return json.loads(run(*PLAN, *words, "--json").stdout)

    before = planned()
    assert before["kernel_cost"] == KERNEL_COST
    kept = dict(dtype="float32", dim=128, features=[], tokens=30_000, density=0.3, share=0.5)
    others = dict(dim=64), dict(features=["LSE"]), dict(dtype="float16"), dict(tokens=4_000), dict(density=0.01)
    for number, other in enumerate((dict(share=0.8), *others)):
        race.measured(CPU)[str(number)] = {**kept, **other}
    assert planned()["kernel_cost"] == 1 / 0.8
    assert planned()["predicted_speedup"] < before["predicted_speedup"]
    assert planned("--kernel-cost", "1.15")["predicted_speedup"] == before["predicted_speedup"]
    assert "measured on this machine by doctor: 80%" in run(*PLAN).stderr
    sized = ("recommend", "--family", "wan2.1-14b", "--height", "720", "--width", "1280")
    assert "on this machine by doctor" in " ".join(run(*sized).stdout.split())
    assert "by doctor" not in run(*sized, "--hardware", "h100").stdout
    race.measured(CPU)["0"] = {**kept, "share": 0.2}
    assert planned()["predicted_speedup"] == 1.0  # such calls go to dense attention
