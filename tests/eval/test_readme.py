"""The pages tell the truth: their tables are the committed results, the README's commands exist."""

import re
import shutil
from pathlib import Path

import pytest
from readme import LONG, PAGES, filled, folded

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_committed_results(page):
    assert (ROOT / page).read_text() == filled(ROOT, page)


def test_make_targets_of_the_readme_exist():
    named = set(re.findall(r"^make ([\w-]+)", (ROOT / "README.md").read_text(), flags=re.M))
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert named
    assert named <= targets


def test_a_missing_mark_is_an_error(tmp_path):
    for part in ("eval/suites", "eval/results", "kernels/bench/results"):
        if (ROOT / part).exists():
            shutil.copytree(ROOT / part, tmp_path / part)
    (tmp_path / "README.md").write_text("<!-- demo -->\n<!-- /demo -->\n")
    with pytest.raises(ValueError, match=r"<!-- presets --> <!-- /presets -->.*found 0"):
        filled(tmp_path, "README.md")


def test_the_readme_is_one_page():
    text = (ROOT / "README.md").read_bytes()
    assert len(text) <= 7_000
    assert len(text.splitlines()) <= 150


def test_long_tables_of_measurements_are_folded():
    table = "\n".join(["| a |", "|---|", *["| 1 |"] * LONG])
    assert folded(f"before\n\n{table}\n\nafter") == (
        f'before\n\n<details markdown="1"><summary>Table of {LONG} rows</summary>\n\n{table}\n\n</details>\n\nafter'
    )
    assert folded(table.rpartition("\n")[0]) == table.rpartition("\n")[0]


def test_links_of_root_pages_lead_somewhere():
    for page in ROOT.glob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path, _, anchor = target.partition("#")
            there = ROOT / path if path else page
            assert there.exists(), f"{page.name}: {target}"
            headings = re.findall(r"^#+ (.*)", there.read_text(encoding="utf-8"), flags=re.M) if anchor else []
            named = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert not anchor or anchor in named, f"{page.name}: {target}"
