"""The pages and the presets tell the truth: their tables are the committed results, the README's commands exist."""

import importlib.util
import re
from pathlib import Path

import pytest
from dit_accel_eval.runs.results import read_lines
from dit_accel_eval.suites.suite import read_suite
from preset_levels import JUDGING, STEPS
from preset_table import FIGURES, RESULTS, SOLVERS, figures_text, rows
from readme import LONG, PAGES, filled, folded
from site_pages import errors_list
from tables import TAG

from dit_accel.errors import install
from dit_accel.methods.preset_figures import PROMPTS
from dit_accel.methods.presets import LEAST_STEPS, LEVELS, MEASURED_ON, PRESETS

ROOT = Path(__file__).parents[2]


def test_tables_are_those_of_the_committed_results():
    for page in PAGES:
        assert (ROOT / page).read_text() == filled(ROOT, page)


def test_studies_that_left_the_tree_are_named_with_the_tag_that_has_them():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "kernels/README.md"]
    for page in pages:
        for paragraph in page.read_text(encoding="utf-8").split("\n\n"):
            gone = [name for name in re.findall(r"eval/studies/\w+\.py", paragraph) if not (ROOT / name).is_file()]
            assert not gone or TAG in paragraph, f"{page}: {gone}"


def test_the_readme_is_one_page_whose_make_targets_exist():
    named = set(re.findall(r"^make ([\w-]+)", (ROOT / "README.md").read_text(), flags=re.M))
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert named
    assert named <= targets
    text = (ROOT / "README.md").read_bytes()
    assert len(text) <= 7_000
    assert len(text.splitlines()) <= 150


def test_a_missing_mark_is_an_error(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/models.md").write_text("<!-- models -->\n<!-- /models -->\n")
    with pytest.raises(ValueError, match=r"<!-- reasons --> <!-- /reasons -->.*found 0"):
        filled(tmp_path, "docs/models.md")


def test_long_tables_of_measurements_are_folded():
    table = "\n".join(["| a |", "|---|", *["| 1 |"] * LONG])
    assert folded(f"before\n\n{table}\n\nafter") == (
        f'before\n\n<details markdown="1"><summary>Table of {LONG} rows</summary>\n\n{table}\n\n</details>\n\nafter'
    )
    assert folded(table.rpartition("\n")[0]) == table.rpartition("\n")[0]


def test_advice_stands_beneath_each_error(tmp_path):
    (tmp_path / "dit_accel/methods").mkdir(parents=True)
    errors = """ConfigError(f"no `mode` is {x!r}; take <a>"); MissingBackend(f"there is no page; {install('ui')}")"""
    (tmp_path / "dit_accel/methods/some.py").write_text(errors)
    assert errors_list(tmp_path, "options").splitlines() == [
        "- `no 'mode' is <x>`<br>take &lt;a>", f"- `there is no page`<br>{install('ui')}"
    ]  # fmt: skip


def test_cells_know_their_column_for_narrow_screens():
    pytest.importorskip("mkdocs", reason="the site needs mkdocs, the extra docs")
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/site_hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    table = "<table><thead><tr><th>a</th><th>b <code>c</code></th></tr></thead>{}</table>"
    rows = "<tr><td{0}>1</td><td{1}>2</td></tr>" * 2
    made = hooks.on_page_content(table.format(rows.format("", "")), None, None, None)
    assert made == table.format(rows.format(' data-label="a"', ' data-label="b c"'))


def test_links_of_root_pages_lead_somewhere():
    for page in ROOT.glob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path, _, anchor = target.partition("#")
            there = ROOT / path if path else page
            assert there.exists(), f"{page.name}: {target}"
            headings = re.findall(r"^#+ (.*)", there.read_text(encoding="utf-8"), flags=re.M) if anchor else []
            named = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert not anchor or anchor in named, f"{page.name}: {target}"


def test_the_code_promises_what_was_measured_which_is_ahead_of_fewer_steps_of_equal_time():
    assert (ROOT / FIGURES).read_text() == figures_text(ROOT), "run eval/studies/preset_table.py"
    found = rows(ROOT)
    for level in LEVELS:
        measured = {(one.figure.model, one.figure.solver, one.figure.steps) for one in found[level]}
        kinds = {(model, solver) for (model, _), solver in SOLVERS.items()}
        assert measured == {(*kind, steps) for kind in kinds for steps in STEPS if steps >= LEAST_STEPS}
        assert {one.lead.count for one in found[level]} == {PROMPTS}
        assert all(one.lead.mean > 0 for one in found[level]), level


def test_prompts_that_judge_chose_nothing():
    for model in MEASURED_ON:
        judged = {line["clip"] for line in read_lines(ROOT / RESULTS.format(model))}
        assert judged == {*JUDGING}
        chose = {line["clip"] for line in read_lines(ROOT / RESULTS.format(f"choose-{model}"))}
        assert chose
        assert not judged & chose


def test_the_suites_beside_other_caches_run_what_the_presets_attach():
    for model in MEASURED_ON:
        arms = {arm.name: arm for arm in read_suite(ROOT / f"eval/suites/presets-{model}.toml").arms}
        for level in LEVELS:
            assert arms[level].methods == (PRESETS[level][0].config,)
