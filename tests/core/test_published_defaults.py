"""What options are where nobody sets them, and the page on what is not as published: values of papers and code."""

import dataclasses
import re
from pathlib import Path

import pytest

from dit_accel.methods.attention.radial import RadialAttention
from dit_accel.methods.registry import methods
from dit_accel.plan.layout import TokenLayout

DOCS = Path(__file__).parents[2] / "docs"
SPARSE = {"block_size": 128, "dense_last_steps": 0, "dense_layers": 1}
WHOLE_RUN = {"start": 0.0, "stop": 1.0}
ENDS = {"warmup_steps": 0.2, "last_steps": 1}

DEFAULTS = {
    "radial": {**SPARSE, "dense_steps": 0.24, "decay_factor": 1.0, "near": "full", "sink": True},
    "sparsed": {**SPARSE, "dense_steps": 0.2, "density": 0.3},
    "sol": {**SPARSE, "block_size": 64, "dense_steps": 0.2, "beta": 1.0, "beta_last": None},
    "lite": {**SPARSE, "dense_steps": 0.1, "dense_layers": 0},
    "lvsa": {**SPARSE, "dense_steps": 0, "dense_layers": 0},
    "ultraimage": dict(
        focus_min=1.0, focus_max=1.3, power=2.0, turn=None, indices=None, follow_above=0.8, enlarge="picture"
    ),
    "nag": {"scale": 5.0, "tau": 2.5, "alpha": 0.25, **WHOLE_RUN},
    "pag": {"scale": 3.0, "layers": None, **WHOLE_RUN},
    "softpag": {"scale": 3.0, "u": 0.5, "heads": None, **WHOLE_RUN},
    "seg": {"scale": 3.0, "layers": None, **WHOLE_RUN},
    "autoguidance": {"scale": 1.0, **WHOLE_RUN},
    "slg": {"scale": 2.8, "start": 0.01, "stop": 0.2, "layers": None},
    "cfgcache": {"warmup_steps": 0.2, "last_steps": 0, "max_consecutive": 1},
    "easycache": {**ENDS, "threshold": 0.05},
    "firstblockcache": {**ENDS, "threshold": 0.08},
    "dbcache": {**ENDS, "threshold": 0.08, "first_blocks": 8, "last_blocks": 0},
    "dbprune": {**ENDS, "threshold": 0.08, "first_blocks": 1, "last_blocks": 0},
    "magcache": dict(
        threshold=0.12, max_consecutive=4, warmup_steps=0.2, ratios=None, compute_at=None, warmup_of="run"
    ),
    "seacache": {"threshold": 0.25, "warmup_steps": 1, "last_steps": 1, "max_consecutive": 2},
    "staticcache": {"warmup_steps": 0.1, "last_steps": 1, "every": 2},
    "teacache": {"warmup_steps": 1, "last_steps": 1, "threshold": 0.1, "polynomial": None, "polynomial_2": None},
}
"""Method -> what neither the user nor the model's recipe sets."""

FIXED = {
    "radial": {"boundary": "any", "order": "raster", "rest": "skip"},
    "sparsed": {"rest": "skip"},
    "sol": {"threshold": "diag", "sink": "text"},
    "lite": {"criterion": "maxgap", "detect_every": 1, "bidirectional": True, "protect_text": True},
    "lvsa": {"window": 4, "first": 1, "rotate": True},
    "ultraimage": {"correct": True, "rows": 256},
    "ultravico": {"center_keys": True},
    "rope": {"kind": "riflex"},
    "delta": {"stride": 64, "reuse": 1, "shrink": True, "rotate": True, "margin": 1.0},
    "dfa": {"every": 2, "share": None, "strict": False, "warmup_steps": 0.2, "last_steps": 1},
    "pag": {"rescale": 0.0, "mode": "branch", "rows": "all", "share_prefix": True},
    "slg": {"rescale": 0.0, "mode": "branch", "share_prefix": True},
    "seg": {"rescale": 0.0, "mode": "branch", "sigma": 1e4, "share_prefix": True},
}
"""Method -> options that no recipe sets."""


def test_defaults_are_the_published_ones_and_configs_can_t_be_written_to():
    assert {name: dict(methods()[name].defaults) for name in DEFAULTS} == DEFAULTS
    for name, options in FIXED.items():
        config = methods()[name]()
        assert {option: getattr(config, option) for option in options} == options
    (numbers,) = re.findall(
        r"`scale`, `tau`, `alpha` \| .*?: ([\d.]+), ([\d.]+) and ([\d.]+);", (DOCS / "guidance.md").read_text()
    )
    assert [float(number) for number in numbers] == [DEFAULTS["nag"][name] for name in ("scale", "tau", "alpha")]
    for config in methods().values():
        assert config.__dataclass_params__.frozen
        assert config.__slots__ is not None
        assert not hasattr(config(), "__dict__")
        assert all(field.kw_only for field in dataclasses.fields(config))


PAGE = (DOCS / "published.md").read_text()
SIDES = {3840: (48, 80), 3600: (45, 80), 1560: (30, 52)}
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if re.search(r"\| \d+ x \d+ \|", line)
]


@pytest.mark.parametrize("row", ROWS, ids=[f"{row[1]}, {row[2]}" for row in ROWS])
def test_radial_s_figures_on_the_page(row):
    _, size, options, published, default, more = row
    frames, tokens = map(int, size.split(" x "))
    decay, near, sink = options.split(", ")
    layout = TokenLayout(frames=frames, height=SIDES[tokens][0], width=SIDES[tokens][1])
    kept = {}
    for boundary in ("published", "any"):
        config = RadialAttention(
            block_size=128, decay_factor=float(decay), near=near, sink=sink == "true", boundary=boundary
        )
        whole = layout.tokens // 128
        kept[boundary] = config.filled().kept(layout)[:whole, :whole]
    assert f"{1 - kept['published'].mean():.4f}" == published
    assert f"{1 - kept['any'].mean():.4f}" == default
    assert f"{kept['any'].sum() / kept['published'].sum() - 1:.0%}".replace("%", " %") == more
    assert (kept["any"] >= kept["published"]).all()


def test_the_docstring_has_the_range_of_the_table():
    assert len({tuple(row[1:3]) for row in ROWS}) == len(ROWS) == 7
    shares = [int(row[-1].removesuffix(" %")) for row in ROWS]
    assert f"{min(shares)} to {max(shares)} % more tiles" in " ".join(RadialAttention.__doc__.split())
