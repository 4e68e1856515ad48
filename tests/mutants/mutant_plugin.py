"""A pytest plugin that writes down how long each passing test takes, for `mutants_run.py`."""

import json
import os
from pathlib import Path

import pytest

_TIMES: dict[str, float] = {}
_FAILED: set[str] = set()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up a test's set-up, call and end."""
    _TIMES[report.nodeid] = _TIMES.get(report.nodeid, 0.0) + report.duration
    if not report.passed:
        _FAILED.add(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the times; only the process that collects all reports has them."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        kept = {name: seconds for name, seconds in _TIMES.items() if name not in _FAILED}
        Path(os.environ["MUTANT_TIMES"]).write_text(json.dumps(kept))
