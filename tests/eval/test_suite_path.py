"""The way of a suite's job through the evaluation stays short."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TRACER = Path(__file__).parents[1] / "support" / "suite_path.py"


@pytest.mark.slow
def test_a_suite_s_job_visits_few_files_and_calls_none_back():
    done = subprocess.run([sys.executable, TRACER, "--json"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["files"] <= 14
    assert found["functions"] <= 128
    assert found["names"] <= 53
    assert found["climbs"] == 0
