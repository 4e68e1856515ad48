"""The run of diffusers' own tests: where they come from, what is asked of pytest, and which differences pass."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

UPSTREAM = Path(__file__).parents[1] / "upstream"
sys.path.insert(0, str(UPSTREAM))

import upstream_run  # noqa: E402
from upstream_judge import Expected, problems, read_expected  # noqa: E402


def ended(**tests: str) -> dict[str, Any]:
    return {"tests": {test: (outcome, "why") for test, outcome in tests.items()}, "counts": {"compared": 1}}


def expect(test: str, outcome: str, mode: str = "neutral") -> Expected:
    return Expected(mode=mode, test=test, outcome=outcome, reason="it must be so")


@pytest.mark.parametrize(
    ("attached", "expected", "said"),
    [
        (ended(a="passed", b="failed"), [], None),
        (ended(a="failed", b="failed"), [], "a: passed plain, failed attached: why"),
        (ended(a="passed", b="passed"), [], "b: failed plain, passed attached: why"),
        (ended(a="failed", b="failed"), [expect("a", "failed")], None),
        (ended(a="failed", b="failed"), [expect("a", "failed", "active")], "a: passed plain, failed attached"),
        (ended(a="passed", b="failed"), [expect("a", "failed")], "ends as it does plain (passed); take it out"),
        (ended(a="passed", b="failed"), [expect("a", "passed")], "ends as it does plain (passed); take it out"),
        (ended(a="error", b="failed"), [expect("a", "failed")], "listed as failed, error attached"),
        (ended(a="passed", b="failed"), [expect("c", "failed")], "c: is listed and there is no such test"),
        (ended(a="passed"), [], "b: it ran in one of the two runs alone"),
        ({**ended(a="passed", b="failed"), "counts": {"compared": 0}}, [], "nothing was compared"),
    ],
)
def test_any_difference_that_is_not_listed_fails_and_any_listed_that_vanished(attached, expected, said):
    found = problems("neutral", ended(a="passed", b="failed"), attached, expected, whole=True)
    assert (said is None and found == []) or (said is not None and len(found) == 1 and said in found[0])


def test_of_picked_tests_the_list_may_hold_others():
    both = ended(a="passed")
    assert problems("neutral", both, both, [expect("c", "failed")], whole=False) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '[[difference]]\nmode = "active"\ntest = "t"\noutcome = "failed"',
            r"'outcome': 'failed'} .*mode, outcome, reason, test",
        ),
        ('[[difference]]\nmode = "active"\ntest = "t"\noutcome = "failed"\nreason = " "', "'reason': ' '}"),
        ('[[difference]]\nmode = "x"\ntest = "t"\noutcome = "failed"\nreason = "r"', r"mode.*'x'.*neutral"),
        (2 * '[[difference]]\nmode = "active"\ntest = "t"\noutcome = "failed"\nreason = "r"\n', r"t .*twice.*active"),
        ("[[differences]]", "has differences"),
    ],
)
def test_a_list_that_is_wrong_is_refused(tmp_path, text, said):
    (tmp_path / "expected.toml").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_expected(tmp_path / "expected.toml")


def test_the_projects_list_can_be_read():
    assert all(one.reason for one in read_expected(UPSTREAM / "expected.toml"))


@pytest.fixture
def repository(tmp_path: Path) -> str:
    """A small repository with a tag and tests, in the place of diffusers'."""
    source = tmp_path / "source"
    for file in ("tests/models/test_it.py", "src/big.py"):
        (source / file).parent.mkdir(parents=True)
        (source / file).write_text("")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"], ["tag", "v1.0"]):
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "uploadpack.allowFilter=true"]
        subprocess.run(["git", "-C", str(source), *who, *command], check=True, capture_output=True)
    return f"file://{source}"


def test_the_tests_are_cloned_once_and_nothing_else(tmp_path, repository, monkeypatch):
    monkeypatch.delenv("DIFFUSERS_TESTS", raising=False)
    root = upstream_run.checkout(tmp_path / "work", repository, "1.0")
    assert root == tmp_path / "work" / "v1.0"
    assert (root / "tests" / "models" / "test_it.py").exists()
    assert not (root / "src").exists()
    assert upstream_run.checkout(tmp_path / "work", "file:///nowhere", "1.0") == root


def test_without_a_network_there_is_a_reason_and_without_a_tag_an_error(tmp_path, repository, monkeypatch):
    monkeypatch.delenv("DIFFUSERS_TESTS", raising=False)
    said = upstream_run.checkout(tmp_path / "work", "file:///nowhere", "1.0")
    assert isinstance(said, str)
    assert "can't be cloned" in said
    assert "set DIFFUSERS_TESTS" in said
    with pytest.raises(ValueError, match=r"v2\.0\.dev0.*DIFFUSERS_TESTS"):
        upstream_run.checkout(tmp_path / "work", repository, "2.0.dev0")
    assert [*(tmp_path / "work").iterdir()] == []
    monkeypatch.setenv("PATH", "")
    said = upstream_run.checkout(tmp_path / "work", repository, "1.0")
    assert isinstance(said, str)
    assert said.startswith("git is not installed")


def test_a_checkout_may_be_named(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSERS_TESTS", str(tmp_path))
    with pytest.raises(ValueError, match=r"DIFFUSERS_TESTS.*tests/models"):
        upstream_run.checkout(tmp_path / "work", "file:///nowhere", "1.0")
    (tmp_path / "tests" / "models").mkdir(parents=True)
    assert upstream_run.checkout(tmp_path / "work", "file:///nowhere", "1.0") == tmp_path


def test_the_command_skips_judges_and_ends_with_a_number(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(upstream_run, "checkout", lambda *_: "no network")
    assert upstream_run.main([]) == 0
    assert "skipped: no network" in capsys.readouterr().out
    (tmp_path / "tests" / "pipelines").mkdir(parents=True)
    monkeypatch.setattr(upstream_run, "checkout", lambda *_: tmp_path)
    monkeypatch.setattr(upstream_run, "read_expected", lambda _: [])
    asked = []

    def run_tests(mode: str, root: Path, arguments: list[str]) -> dict[str, Any]:
        asked.append((mode, *arguments))
        tests = {"a": ("failed" if mode == "active" else "passed", "why"), "b": ("error", "x\nnot installed")}
        counts = {"compared": 1, "planned": 1}
        return {"tests": tests, "counts": counts, "built": ["X"], "not_collected": {"b.py": "no"}}

    monkeypatch.setattr(upstream_run, "run_tests", run_tests)
    assert upstream_run.main(["--modes", "neutral,keep-all", "-k", "Wan"]) == 0
    usual = "tests/models/transformers", "-k", "Wan"
    assert asked == [("plain", *usual), ("neutral", *usual), ("keep-all", *usual)]
    out = capsys.readouterr().out
    assert "not run: b.py: no" in out
    assert "fail plain: 1 tests: not installed" in out
    assert "neutral: 2 tests: 1 error, 1 passed, 1 compared, 1 planned, 1 classes" in out
    assert upstream_run.main(["tests/pipelines::a"]) == 1
    assert asked[-1] == ("active", "tests/pipelines::a")
    assert "active: a: passed plain, failed attached: why" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        upstream_run.main(["--modes", "all"])
    assert "no mode is called all" in capsys.readouterr().err


def test_a_run_that_does_not_end_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(upstream_run, "WORK", tmp_path / "work")
    monkeypatch.setattr(upstream_run.sys, "executable", "false")
    with pytest.raises(RuntimeError, match=r"plain: pytest.*1.*plain\.log"):
        upstream_run.run_tests("plain", tmp_path, [])


def test_the_ordinary_suite_collects_nothing_of_it():
    assert [*UPSTREAM.glob("*.py")]
    assert not [*UPSTREAM.rglob("test_*.py"), *UPSTREAM.rglob("*_test.py"), *UPSTREAM.rglob("conftest.py")]
