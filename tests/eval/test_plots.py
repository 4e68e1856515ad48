"""Pictures of suites: small files, the right arms on the frontier, and a clear word where there is nothing to draw."""

from dataclasses import replace
from pathlib import Path

import lead_picture
import pytest
import suite_picture
from dit_accel_eval.statistics import ClipMean, judge
from dit_accel_eval.suites.figures import ArmFigures
from PIL import Image

SUITES = Path(__file__).parents[2] / "eval" / "suites"


def figure(name: str, psnr: float, work: float, real: float | None = None, clips: int = 2) -> ArmFigures:
    means = {"work": work, "work_real": work if real is None else real}
    found = ClipMean(mean=psnr, median=psnr, count=clips, low=psnr - 1, high=psnr + 1)
    return ArmFigures(name=name, clips=clips, means=means, psnr=found)


DENSE = [figure(f"unipc {steps}", 20 + steps, steps) for steps in range(6, 12)]


def test_the_frontier_is_what_none_surpasses_at_as_little_work():
    good, bad = figure("a, 0.1 12", 33, 9.5), figure("a, 0.2 12", 27, 9)
    assert suite_picture.frontier([*DENSE, good, bad], "work") == [*DENSE[:4], good]


@pytest.mark.parametrize(("real", "panels"), [(None, 1), (6.0, 2)])
def test_a_picture_has_a_panel_for_each_work_that_differs_and_is_small(tmp_path, real, panels):
    arms = [*DENSE, *(figure(f"group {n}, {s} 12", 25 + n, 6 + s, real) for n in range(9) for s in range(6))]
    suite_picture.draw(arms, "a suite", tmp_path / "s.png")
    assert Image.open(tmp_path / "s.png").width == pytest.approx((3.5 + 5.5 * panels) * suite_picture.DOTS, abs=1)
    assert (tmp_path / "s.png").stat().st_size < 150_000


def test_arms_of_fewer_clips_are_left_out(tmp_path):
    suite_picture.draw(DENSE, "t", tmp_path / "a.png")
    suite_picture.draw([*DENSE, figure("unipc 12", 90, 12, clips=1)], "t", tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


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
