"""Runs tests for `mutants_run.py`, each time in a fork of one process that has torch and diffusers loaded already.

It reads a line of JSON, {"tests": [names], "limit": seconds of processor time}, and answers with one:
{"end": "passed"}, {"end": "hung"} or {"end": "failed", "test": name}. What waits may take `WAITS` times the limit.

As a plugin of pytest it writes down how long each passing test takes.
"""

import json
import os
import resource
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

TIMES: Counter[str] = Counter()
FAILED: set[str] = set()
WAITS = 4
"""Wall-clock seconds a second of the limit: the machine may be busy with other things."""


def load() -> None:
    """Import what takes long and is not ours: what is ours must be imported with its defect."""
    import diffusers  # noqa: F401
    import hypothesis  # noqa: F401
    import matplotlib  # noqa: F401
    import torch
    import torch._dynamo
    import transformers  # noqa: F401
    import triton  # noqa: F401
    from diffusers.models import transformers as _  # noqa: F401
    from diffusers.pipelines import pipeline_utils  # noqa: F401

    torch.set_num_threads(1)
    ours = [name for name in sys.modules if name.startswith("dit_accel")]
    assert not ours, f"{ours} are loaded already, so that a defect in them would not be seen"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up a test's set-up, call and end."""
    TIMES[report.nodeid] += report.duration
    if not report.passed:
        FAILED.add(report.nodeid)


def pytest_sessionfinish() -> None:
    """Write the times; only the process that collects all reports has them."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        passed = {name: seconds for name, seconds in TIMES.items() if name not in FAILED}
        Path(os.environ["MUTANT_TIMES"]).write_text(json.dumps(passed))


def run(tests: list[str], out: Path) -> int:
    """Run tests in the order given until one fails, and write its name to a file."""

    class Chosen:
        """Leaves the tests that are named, in that order, and notes the first that fails."""

        def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
            place = {name: number for number, name in enumerate(tests)}
            items[:] = sorted((item for item in items if item.nodeid in place), key=lambda item: place[item.nodeid])

        def pytest_runtest_logreport(self, report: pytest.TestReport | pytest.CollectReport) -> None:
            if report.failed and not out.exists():
                out.write_text(report.nodeid)

        pytest_collectreport = pytest_runtest_logreport

    files = list(dict.fromkeys(name.split("::")[0] for name in tests))
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files], plugins=[Chosen()]))


def main() -> None:
    """Answer requests until standard input ends."""
    load()
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        out = Path(f"failed-{os.getpid()}")
        out.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            resource.setrlimit(resource.RLIMIT_CPU, (int(request["limit"]) + 1,) * 2)
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
            code = 2
            try:
                code = run(request["tests"], out)
            finally:
                os._exit(code)
        end = time.monotonic() + WAITS * request["limit"]
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < end:
            time.sleep(0.02)
        if ended[0] == 0:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            answer = {"end": "hung"}
        elif os.WIFSIGNALED(ended[1]) and os.WTERMSIG(ended[1]) in (signal.SIGXCPU, signal.SIGKILL):
            answer = {"end": "hung"}
        elif os.waitstatus_to_exitcode(ended[1]) in (0, 5):
            answer = {"end": "passed"}
        else:  # a crash has no name
            answer = {"end": "failed", "test": out.read_text() if out.exists() else ""}
        out.unlink(missing_ok=True)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
