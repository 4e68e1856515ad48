"""The figures of presets in the code and on the pages are those of their committed runs."""

from pathlib import Path

from dit_accel_eval.runs.results import read_lines
from dit_accel_eval.suites.suite import read_suite
from preset_levels import CHOOSING, JUDGING, STEPS
from preset_table import FIGURES, RESULTS, SOLVERS, figures_text, rows

from dit_accel.methods.preset_figures import PROMPTS
from dit_accel.methods.presets import LEAST_STEPS, LEVELS, MEASURED_ON, PRESETS

ROOT = Path(__file__).parents[2]


def test_the_code_promises_what_was_measured():
    assert (ROOT / FIGURES).read_text() == figures_text(ROOT), "run eval/studies/preset_table.py"
    found = rows(ROOT)
    for level in LEVELS:
        measured = {(one.figure.model, one.figure.solver, one.figure.steps) for one in found[level]}
        kinds = {(model, solver) for (model, _), solver in SOLVERS.items()}
        assert measured == {(*kind, steps) for kind in kinds for steps in STEPS if steps >= LEAST_STEPS}
        assert {one.lead.count for one in found[level]} == {PROMPTS}


def test_no_level_is_behind_fewer_steps_of_equal_time():
    for level, of in rows(ROOT).items():
        for one in of:
            assert one.lead.mean > 0, (level, one.figure)


def test_prompts_that_judge_chose_nothing():
    for model in MEASURED_ON:
        judged = {line["clip"] for line in read_lines(ROOT / RESULTS.format(model))}
        assert judged == {*JUDGING}
        assert not judged & {*CHOOSING}


def test_the_suites_beside_other_caches_run_what_the_presets_attach():
    for model in MEASURED_ON:
        arms = {arm.name: arm for arm in read_suite(ROOT / f"eval/suites/presets-{model}.toml").arms}
        for level in LEVELS:
            assert arms[level].methods == (PRESETS[level][0].config,)
