"""Pictures of methods and suites: what they are drawn from, and how; small files."""

from dataclasses import replace
from pathlib import Path

import lead_picture
import numpy as np
import pytest
import suite_picture
from dit_accel_eval.statistics import ClipMean, frontier, judge
from dit_accel_eval.suites.figures import ArmFigures
from method_pictures import PICTURES, frames_seen, pipeline, run, tile_states
from PIL import Image
from strips import DARK, GREY

import dit_accel
from dit_accel.methods.registry import methods

SMALL = dict(height=32, width=32, num_frames=9, num_inference_steps=4)


def colours(picture: Image.Image) -> set[str]:
    counted = picture.convert("RGB").getcolors(picture.width * picture.height)
    assert counted is not None
    return {"#{:02x}{:02x}{:02x}".format(*colour) for _, colour in counted}


def test_every_method_but_rope_whose_picture_is_there_already_has_one():
    assert set(PICTURES) == set(methods()) - {"rope"}


def test_what_a_cache_skips_is_what_did_not_run():
    cache = dit_accel.StaticCache(steps=(1, 0, 1, 0), warmup_steps=1, last_steps=0)
    blocks = dit_accel.ProfilingCache(blocks="0-5", every=2, warmup_steps=1, last_steps=0)
    assert np.array_equal(run("wan-tiny", (cache,), **SMALL).computed, np.tile([True, False, True, False], (12, 1)))
    computed = run("wan-tiny", (blocks,), **SMALL).computed
    assert computed[6:].all()
    assert not computed[:6].all(axis=1).any()
    assert dit_accel.attachment_of(pipeline("wan-tiny")) is None


def test_tiles_are_told_by_lists_bits_and_routing():
    sizes, call = dict(block_size=16, dense_steps=0, dense_layers=0), {**SMALL, "num_inference_steps": 2}
    sol = run("wan-plain", (dit_accel.SolAttention(beta=0.0, **sizes),), **call).calls[-1]
    assert set(np.unique(tile_states(sol))) == {1, 2}
    seen = run("wan-plain", (dit_accel.RadialAttention(decay_factor=0.2, near="half", sink=False, **sizes),), **call)
    assert set(np.unique(tile_states(seen.calls[-1]))) == {0, 2}
    assert colours(frames_seen(seen)) >= {GREY, DARK}


SUITES = Path(__file__).parents[2] / "eval" / "suites"


def figure(name: str, psnr: float, work: float, real: float | None = None, clips: int = 2) -> ArmFigures:
    means = {"work": work, "work_real": work if real is None else real}
    found = ClipMean(mean=psnr, median=psnr, count=clips, low=psnr - 1, high=psnr + 1)
    return ArmFigures(name=name, clips=clips, means=means, psnr=found)


DENSE = [figure(f"unipc {steps}", 20 + steps, steps) for steps in range(6, 12)]


def test_the_frontier_is_what_none_surpasses_at_as_little_work():
    good, bad = figure("a, 0.1 12", 33, 9.5), figure("a, 0.2 12", 27, 9)
    found = frontier([*DENSE, good, bad], lambda arm: (arm.means["work"], arm.psnr.mean))
    assert found == [*DENSE[:4], good]


@pytest.mark.parametrize(("real", "panels"), [(None, 1), (6.0, 2)])
def test_a_picture_has_a_panel_for_each_work_that_differs_and_is_small(tmp_path, real, panels):
    arms = [*DENSE, *(figure(f"group {n}, {s} 12", 25 + n, 6 + s, real) for n in range(9) for s in range(6))]
    suite_picture.draw(arms, "a suite", tmp_path / "s.png")
    assert Image.open(tmp_path / "s.png").width == pytest.approx((3.5 + 5.5 * panels) * suite_picture.DOTS, abs=1)
    assert (tmp_path / "s.png").stat().st_size < 150_000


def test_leads_are_drawn_of_the_settings_that_have_one(tmp_path):
    leads = judge({name: [base + 0.1 * clip for clip in range(8)] for name, base in (("a", 2.0), ("b", -3.0))})
    arms = [replace(figure(name, 30, 9), means={"steps_in_time": 9.0}, ahead={"steps_in_time": leads[name]})
            for name in leads]  # fmt: skip
    lead_picture.draw({"wan-tiny": arms, "flux-tiny": arms}, tmp_path / "a.png")
    lead_picture.draw({"wan-tiny": [*arms, *DENSE], "flux-tiny": arms}, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_suite_without_results_says_so(tmp_path, capsys):
    assert suite_picture.main([str(SUITES / "knee-wan-tiny.toml"), "--results", str(tmp_path / "none.jsonl")]) == 2
    assert "knee-wan-tiny: wan-tiny, 12 held-out clips has no results to draw" in capsys.readouterr().err
