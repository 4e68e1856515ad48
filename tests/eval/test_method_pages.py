"""Every method has a page by one template, whose picture exists and whose code and command line run."""

import functools
import re
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from dit_accel_assets import model_path
from method_pages import FOLDER, options_table
from PIL import Image
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
    "autoguidance": ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", str(model_path("wan-tiny"))),
}
"""Method -> what of its code belongs to the real model, and what takes its place on a tiny one."""


def page(name: str) -> str:
    return (ROOT / FOLDER / f"{name}.md").read_text(encoding="utf-8")


@functools.cache
def pipeline(cls: str) -> tuple[Any, dict[str, Any]]:
    """The embedded or tiny pipeline of a class, and what a short call of it takes."""
    if cls == "StableDiffusion3Pipeline":
        pipe, call = stock_pipeline("StableDiffusion3Pipeline")
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


@pytest.mark.parametrize("name", methods())
def test_the_code_of_a_page_runs(name, monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```", page(name), flags=re.M | re.S)
    ((cls, repo),) = re.findall(r"(\w+)\.from_pretrained\(\"(.+?)\"\)", code)
    pipe, call = pipeline(cls)
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
