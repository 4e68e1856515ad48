"""Every method has a page by one template, whose picture exists and whose code runs; what pictures are drawn from."""

import functools
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import lead_picture
import numpy as np
import pytest
import suite_picture
import torch
from dit_accel_assets import model_path
from dit_accel_eval.statistics import ClipMean, frontier, judge
from dit_accel_eval.suites.figures import ArmFigures
from method_pages import FOLDER, options_table
from method_pictures import PICTURES, frames_seen, pipeline, run, tile_states
from PIL import Image
from strips import DARK, GREY
from tiny_stock import stock_pipeline

import dit_accel
from dit_accel.attachment.backends import UnplannedRun
from dit_accel.methods.registry import methods

ROOT = Path(__file__).parents[2]
SECTIONS = ["In one line", "What it does", "When to use it", "What it costs", "Options", "Source and departures"]
SMALL: dict[str, dict[str, Any]] = {
    "WanPipeline": dict(height=32, width=32, num_frames=9, num_inference_steps=2, output_type="latent"),
    "FluxPipeline": dict(
        height=96, width=96, num_inference_steps=2, output_type="latent", true_cfg_scale=1.0, max_sequence_length=64
    ),
}
BEYOND = {
    "lvsa": dict(num_frames=65),
    "ultravico": dict(num_frames=65),
    "rope": dict(height=112),
    "ultraimage": dict(height=112),
}
"""Method -> a size above the trained one, where it acts."""

FITTED = {
    "pag": ("L13", "L1"),
    "softpag": ("L9", "L1"),
    "seg": ("L7-9", "L1"),
    "slg": ("SLG()", "SLG(layers='L5')"),
    "profilingcache": ("ProfilingCache()", "ProfilingCache(blocks='0-5', every=3)"),
    "referencecache": ('load_image("kite.png")', "None"),
    "autoguidance": ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", str(model_path("wan-tiny"))),
}
"""Method -> what of its code belongs to the real model, and what takes its place on a tiny one."""


def page(name: str) -> str:
    return (ROOT / FOLDER / f"{name}.md").read_text(encoding="utf-8")


@functools.cache
def short_pipeline(cls: str) -> tuple[Any, dict[str, Any]]:
    """The embedded or tiny pipeline of a class, and what a short call of it takes."""
    if cls not in SMALL:
        pipe, call = stock_pipeline(cls)
        call = {**call, "prompt": None, "num_inference_steps": 2}
    else:
        model = {"WanPipeline": "wan-plain", "FluxPipeline": "flux-tiny"}[cls]
        pipe, call = getattr(diffusers, cls).from_pretrained(model_path(model), torch_dtype=torch.float32), SMALL[cls]
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


def test_a_page_has_every_section_in_order_and_a_small_picture():
    for name in methods():
        text = page(name)
        assert re.findall(r"^## (.*)", text, flags=re.M) == SECTIONS
        assert re.match(rf"# {methods()[name].__name__}\n\n\S", text)
        assert len(text.splitlines()) <= 70
        (picture,) = re.findall(r"^!\[.+\]\((.+)\)$", text, flags=re.M)
        path = (ROOT / FOLDER / picture).resolve()
        with Image.open(path) as image:
            assert image.width <= 1000
        assert path.parent != ROOT / FOLDER or path.stat().st_size <= 60_000
        (line,) = re.findall(r"^```\n(dit-accel .*)\n```", text, flags=re.M)
        assert re.match(rf"dit-accel generate .*(--{name}\b|--set {name}\.)", line)
        assert re.search(r"arxiv\.org/abs/\d{4}\.\d{5}|which has no paper", text)


NUMBER = r"([+-]?\d*\.?\d+)"
INTERVAL = re.compile(rf"(?:{NUMBER}(?: ?%| dB| points)? )?\[{NUMBER}%?, {NUMBER}%?\]")
"""A mean, where one stands right before it, and its interval."""


@functools.cache
def measured() -> set[tuple[float | None, float, float]]:
    """Every (mean, low, high) of the other pages, whose tables are the committed results, and with its signs turned."""
    texts = [
        path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md") if path.parent.name != "methods"
    ]
    found = {(float(mean) if mean else None, float(low), float(high))
             for text in texts for mean, low, high in INTERVAL.findall(text)}  # fmt: skip
    return found | {(None if mean is None else -mean, -high, -low) for mean, low, high in found}


def agrees(shown: str, value: float | None) -> bool:
    """Whether a number is shown as one is rounded; what has no number agrees with any."""
    digits = len(shown.partition(".")[2])
    return not shown or value is None or abs(float(shown) - value) <= 0.5 * 10**-digits + 1e-9


def test_the_intervals_of_a_page_are_those_of_the_tables():
    """A loss is shown as what it is behind by, with the signs turned round."""
    for name in methods():
        cost = page(name).partition("## What it costs")[2].partition("## Options")[0]
        for shown in INTERVAL.findall(cost):
            assert any(all(map(agrees, shown, known)) for known in measured()), shown


def test_there_is_no_page_or_picture_of_anything_else():
    names = {*methods(), "index", "shared"}
    assert {path.stem for path in (ROOT / FOLDER).glob("*.md")} == names
    assert {path.stem for path in (ROOT / FOLDER).glob("*.png")} <= names
    assert set(PICTURES) == set(methods()) - {"rope"}  # whose picture is there already


@pytest.mark.parametrize("name", methods())
def test_the_code_of_a_page_runs(name, monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```", page(name), flags=re.M | re.S)
    ((cls, repo),) = re.findall(r"(\w+)\.from_pretrained\(\"(.+?)\"\)", code)
    pipe, call = short_pipeline(cls)
    kind, original = type(pipe), type(pipe).__call__
    monkeypatch.setattr(kind, "from_pretrained", lambda source: pipe if source == repo else pytest.fail(source))
    small = functools.wraps(original)(
        lambda self, prompt, **given: original(self, **{"prompt": prompt, **given, **call, **BEYOND.get(name, {})})
    )
    monkeypatch.setattr(kind, "__call__", small)
    old, new = FITTED.get(name, ("", ""))
    assert old in code
    names: dict[str, Any] = {}
    if name == "autoguidance":  # which loads the weaker model by itself
        monkeypatch.setattr(kind, "from_pretrained", lambda source: pipe)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UnplannedRun)
            exec(code.replace(old, new) if old else code, names)
        attachment = dit_accel.attachment_of(pipe)
        assert attachment is not None
        assert name in attachment.report().methods
        assert ("video" in names) == (cls == "WanPipeline")
    finally:
        if (left := dit_accel.attachment_of(pipe)) is not None:
            left.detach()


def test_a_table_has_own_options_first_then_the_names_of_shared_ones():
    table = options_table("nag")
    assert table.index("| `scale` |") < table.index("| `start` |")
    table = options_table("radial")
    assert "| `near` | `full`, `half` | model's, else `full` |" in table
    assert "| `dense_steps` |" not in table
    assert "`dense_steps` (model's, else `0.24`)" in table


SHORT = dict(height=32, width=32, num_frames=9, num_inference_steps=4)


def colours(picture: Image.Image) -> set[str]:
    counted = picture.convert("RGB").getcolors(picture.width * picture.height)
    assert counted is not None
    return {"#{:02x}{:02x}{:02x}".format(*colour) for _, colour in counted}


def test_what_a_cache_skips_is_what_did_not_run():
    cache = dit_accel.StaticCache(steps=(1, 0, 1, 0), warmup_steps=1, last_steps=0)
    blocks = dit_accel.ProfilingCache(blocks="0-5", every=2, warmup_steps=1, last_steps=0)
    assert np.array_equal(run("wan-tiny", (cache,), **SHORT).computed, np.tile([True, False, True, False], (12, 1)))
    computed = run("wan-tiny", (blocks,), **SHORT).computed
    assert computed[6:].all()
    assert not computed[:6].all(axis=1).any()
    assert dit_accel.attachment_of(pipeline("wan-tiny")) is None


def test_tiles_are_told_by_lists_bits_and_routing():
    sizes, call = dict(block_size=16, dense_steps=0, dense_layers=0), {**SHORT, "num_inference_steps": 2}
    sol = run("wan-plain", (dit_accel.SolAttention(beta=0.0, **sizes),), **call).calls[-1]
    assert set(np.unique(tile_states(sol))) == {1, 2}
    seen = run("wan-plain", (dit_accel.RadialAttention(decay_factor=0.2, near="half", sink=False, **sizes),), **call)
    assert set(np.unique(tile_states(seen.calls[-1]))) == {0, 2}
    assert colours(frames_seen(seen)) >= {GREY, DARK}


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
