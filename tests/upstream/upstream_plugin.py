"""The pytest plugin that runs foreign tests in one mode and writes down how each of them ended."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
from upstream_models import Watch, covered_classes

RANK = ("passed", "skipped", "xfailed", "xpassed", "failed", "error")
"""How a test ends, what weighs more last; an error lies outside the test's own call: in set-up, or what we found."""


class UpstreamPlugin:
    """Attaches a mode's methods to all models that the session's tests build; in mode ``plain`` nothing is touched.

    It writes a JSON file of tests (id -> outcome and message), counts, built and not_collected.
    """

    def __init__(self, mode: str, out: Path) -> None:
        self._out = out
        self._watch = None if mode == "plain" else Watch(mode)
        self._tests: dict[str, tuple[str, str]] = {}
        self._not_collected: dict[str, str] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out the tests of models that no adapter covers."""
        covered = set(covered_classes())
        left, out = [], []
        for item in items:
            (left if _model_class(item) in {None, *covered} else out).append(item)
        config.hook.pytest_deselected(items=out)
        items[:] = left

    def pytest_collection_finish(self) -> None:
        """Wrap the constructors, after the test modules are imported; spare the collector what will stay."""
        for cls in covered_classes() if self._watch else ():
            self._watch.follow(cls)
        gc.collect()
        gc.freeze()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Begin a test."""
        if self._watch:
            self._watch.begin(compiles=item.get_closest_marker("compile") is not None)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self) -> Any:
        """Detach when a test is over, and fail it by what was found."""
        findings: list[str] = []
        try:
            result = yield
        finally:
            if self._watch:
                findings = self._watch.end()
        if findings:
            pytest.fail("\n".join(findings), pytrace=False)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the heaviest outcome of a test's phases."""
        outcome: str = report.outcome
        if hasattr(report, "wasxfail"):
            outcome = "xpassed" if report.passed else "xfailed"
        elif report.failed and report.when != "call":
            outcome = "error"
        before, _ = self._tests.get(report.nodeid, ("passed", ""))
        if report.nodeid not in self._tests or RANK.index(outcome) > RANK.index(before):
            self._tests[report.nodeid] = outcome, _message(report) if report.failed else ""

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note the files that can't be imported here."""
        if report.failed:
            self._not_collected[report.nodeid] = report.longreprtext.strip().splitlines()[-1].removeprefix("E").strip()

    def pytest_sessionfinish(self) -> None:
        """Write down what was seen."""
        counts, built = (dict(self._watch.counts), sorted(self._watch.built)) if self._watch else ({}, [])
        seen = {"tests": self._tests, "counts": counts, "built": built, "not_collected": self._not_collected}
        self._out.write_text(json.dumps(seen))


def _model_class(item: pytest.Item) -> Any:
    """Return the class that a test of diffusers' model tests is about, or None."""
    cls = getattr(item, "cls", None)
    if cls is None or not hasattr(cls, "model_class"):
        return None
    try:
        return cls().model_class
    except Exception:  # a mixin, or one that needs more than a bare instance: let the test tell
        return None


def _message(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message if crash else report.longreprtext.strip()
