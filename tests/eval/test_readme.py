"""The pages and the presets tell the truth: their tables are the committed results; the demo that they show."""

import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import demo
import imageio_ffmpeg
import numpy as np
import pytest
import typer
from dit_accel_eval.runs.results import read_lines
from dit_accel_eval.suites.suite import read_suite
from PIL import Image
from preset_levels import JUDGING, STEPS
from preset_table import FIGURES, RESULTS, SOLVERS, figures_text, rows
from readme import PAGES, filled
from tables import TAG
from typer.testing import CliRunner

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


def test_prompts_that_judge_chose_nothing_and_suites_beside_other_caches_run_what_the_presets_attach():
    for model in MEASURED_ON:
        judged = {line["clip"] for line in read_lines(ROOT / RESULTS.format(model))}
        assert judged == {*JUDGING}
        chose = {line["clip"] for line in read_lines(ROOT / RESULTS.format(f"choose-{model}"))}
        assert chose
        assert not judged & chose
        arms = {arm.name: arm for arm in read_suite(ROOT / f"eval/suites/presets-{model}.toml").arms}
        for level in LEVELS:
            assert arms[level].methods == (PRESETS[level][0].config,)


@pytest.mark.slow
def test_the_demo_compares_and_writes(tmp_path: Path):
    app = typer.Typer()
    app.command()(demo.main)
    out = tmp_path / "demo"
    result = CliRunner().invoke(app, ["--out", str(out), "--num-frames", "1", "--seeds", "2"])
    assert result.exit_code == 0, result.output
    assert {entry.name for entry in out.iterdir()} == {"comparison.mp4", "comparison.gif", "comparison.json"}
    written = json.loads((out / "comparison.json").read_text())
    dense, fewer, ours = written["arms"]
    assert (dense["num_inference_steps"], dense["work"]) == (30, [30.0, 30.0])
    assert fewer["num_inference_steps"] == np.ceil(30 * np.median(np.divide(ours["seconds"], dense["seconds"])))
    assert 5 <= np.mean(ours["work"]) < 0.75 * ours["num_inference_steps"]
    assert list(ours["methods"]) == ["easycache"]
    assert (dense["psnr"], min(ours["psnr"]) > 15) == ([], True)
    assert written["shown_seed"] in (0, 1)
    for text in ("against fewer steps", "dense", "fewer steps", "preset fast", "2 seeds", "That is one prompt"):
        assert text in result.stdout
    width, height = 3 * 64 * demo.SCALE, 2 * 64 * demo.SCALE + 4 * demo.LINE
    assert next(imageio_ffmpeg.read_frames(str(out / "comparison.mp4")))["size"] == (width, height)
    assert Image.open(out / "comparison.gif").size == (width, height)


def test_a_pause_of_the_machine_does_not_decide_the_rival(monkeypatch):
    """One dense run took ten times as long as the others."""
    seconds = iter([4.0, 2.4, 40.0, 2.4, 4.0, 2.4])

    def run(model, arm, seed):
        return SimpleNamespace(seconds=next(seconds, 2.5), frames=np.zeros((1, 8, 8, 3)), counts=None)

    monkeypatch.setattr(demo, "_run", run)
    monkeypatch.setattr(demo, "_outcome", lambda name, arm, runs, dense, model: (name, arm, runs))
    model = SimpleNamespace(run=lambda *args, **options: None)
    _, (name, fewer, _), _ = demo.compare(model, 3)
    assert (name, fewer.num_inference_steps) == ("fewer steps", 18)


def test_the_picture_is_of_the_seed_of_median_lead_and_the_middle_prompt_of_those_that_chose():
    ours, fewer = (SimpleNamespace(psnr=psnr) for psnr in ([40.0, 30.0, 35.0, 50.0], [30.0, 31.0, 30.0, 20.0]))
    assert demo.middle_seed(ours, fewer) == 2
    # PSNRs of the preset's cache in 30 steps on clips 200 and 203: 42.5 and 45.7 dB
    assert demo.shown_prompt("wan-tiny") == "two cyan grainy circles shrinking on a grainy black background"
