"""The figures of presets in the code are those of their committed suites."""

from pathlib import Path

import pytest
from dit_accel_eval.suites.suite import read_suite
from preset_table import figures, table

from dit_accel.methods.presets import LEVELS, MEASURED_ON, MEASURED_STEPS, PRESETS

ROOT = Path(__file__).parents[2]


def test_the_code_promises_what_was_measured():
    measured = figures(ROOT)
    assert set(measured) == set(MEASURED_ON), "run eval/suites/presets-*.toml, and commit their results"
    for level in LEVELS:
        cache = PRESETS[level][0]
        least = min(of[level].psnr.mean for of in measured.values())
        assert cache.psnr == pytest.approx(least, abs=0.51), level
        assert cache.psnr <= least
        assert cache.skips == pytest.approx(min(of[level].skipped for of in measured.values()), abs=0.011), level


def test_the_suites_run_what_the_presets_attach():
    for model in MEASURED_ON:
        suite = read_suite(ROOT / f"eval/suites/presets-{model}.toml")
        assert abs(suite.reference_steps - MEASURED_STEPS) <= 2
        arms = {arm.name: arm for arm in suite.arms}
        for level in LEVELS:
            assert arms[level].methods == (PRESETS[level][0].config,)


def test_a_model_without_results_is_left_out(tmp_path: Path):
    assert figures(tmp_path) == {}
    assert "presets-flux-tiny.toml" in table(tmp_path)
