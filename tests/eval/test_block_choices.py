"""The place of a profile's choice among all: on made-up results, and the committed ones."""

import json
from itertools import combinations
from pathlib import Path

from dit_accel_eval.block_choices import choices, table
from dit_accel_eval.results import read_lines

RESULTS = Path(__file__).parents[2] / "eval" / "results"


def test_places_on_made_up_results():
    lines = [
        {"methods": {"profilingcache": {"blocks": [*blocks]}}, "clip": clip, "psnr": 30.0 - sum(blocks) + clip}
        for blocks in combinations(range(4), 2) for clip in range(3)
    ]  # fmt: skip
    lines.append({"methods": {}, "clip": 0, "psnr": 99.0})
    good, bad = [0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0]
    rows = [*table(lines, {"scores": {"attention": bad, "delta": good, "error": good}})]
    assert rows[2].startswith("| attention | 2-3 | 6 of 6 | 6, 6, 6 | -2.00")
    assert rows[2].endswith("| -1.00 |")
    assert rows[3].startswith("| delta | 0-1 | 1 of 6 | 1, 1, 1 | +2.00")
    assert rows[3].endswith("| +1.00 |")


def test_the_documented_table_is_that_of_the_committed_results():
    lines = read_lines(RESULTS / "profiling-wan-tiny.jsonl")
    assert len(choices(lines)) == 20
    (entry,) = json.loads((RESULTS / "profile-wan-tiny.json").read_text())["transformers"].values()
    page = (RESULTS.parents[1] / "docs" / "block-caches.md").read_text()
    assert all(row in page for row in table(lines, entry))
