"""The place of a profile's choice among all: on made-up results, and the committed ones."""

import json
import random
from itertools import combinations
from pathlib import Path

import pytest
from block_choices import main, scores_of, table
from dit_accel_eval.suites.suite import read_suite
from dit_accel_eval.tune.block_ranking import cached_blocks
from dit_accel_eval.tune.profile_watch import CRITERIA

from dit_accel import ConfigError

RESULTS = Path(__file__).parents[2] / "eval" / "results"


def test_places_on_made_up_results():
    lines = [
        {"methods": {"profilingcache": {"blocks": [*blocks]}}, "clip": clip, "psnr": 30.0 - sum(blocks) + clip}
        for blocks in combinations(range(4), 2) for clip in range(3)
    ]  # fmt: skip
    lines.append({"methods": {}, "clip": 0, "psnr": 99.0})
    good, bad = [0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0]
    told = {"attention": bad, "delta": good, "error": good}
    rows = [*table(lines, told)]
    assert rows[2].startswith("| attention | 2-3 | 6 of 6 | 6, 6, 6 | -2.00")
    assert rows[2].endswith("| -1.00 |")
    assert rows[3].startswith("| delta | 0-1 | 1 of 6 | 1, 1, 1 | +2.00")
    assert rows[3].endswith("| +1.00 |")
    assert [*table([*lines, {**lines[0], "clip": 3, "psnr": 99.0}], told)] == rows  # a clip that is not whole yet
    with pytest.raises(ConfigError, match=r"blocks 2-3, .*attention;"):
        [*table([line for line in lines if line["methods"].get("profilingcache") != {"blocks": [2, 3]}], told)]
    with pytest.raises(ConfigError, match=r"no clip.*choice"):
        [*table([], told)]


def test_each_criterion_is_the_first_profiles_that_tells_it(tmp_path):
    for name, scores in (
        ("one", dict(attention=[None, None], delta=[1, 2])),
        ("two", dict(attention=[3, 4], delta=[5, 6], error=[7, 8])),
    ):
        entry = {"weights": "", "blocks": 2, "cached": [0], "scores": scores}
        (tmp_path / f"{name}.json").write_text(json.dumps({"profile": 1, "transformers": {"transformer": entry}}))
    paths = [tmp_path / "one.json", tmp_path / "two.json"]
    assert scores_of(paths) == {"delta": [1, 2], "attention": [3, 4], "error": [7, 8]}
    with pytest.raises(ConfigError, match=r"1 profiles.*attention, error"):
        scores_of(paths[:1])
    assert main([]) == main([str(tmp_path / "no.jsonl"), *map(str, paths)]) == 2


def test_the_random_choices_are_those_that_the_suite_says():
    suite = read_suite(RESULTS.parent / "suites" / "profiling-flux-tiny.toml")
    known = {one.methods[0].groups()[0] for one in suite.arms}
    drawn = {*random.Random(0).sample([*combinations(range(12), 6)], 200)}
    scores = scores_of([RESULTS / "profile-flux-tiny.json", RESULTS / "profile-flux-tiny-masked.json"])
    own = {tuple(cached_blocks(scores[criterion], count=6)[0]) for criterion in CRITERIA}
    assert known == drawn | own
