"""What options are where nobody sets them: the values that papers and released code have, as the pages say."""

import dataclasses
import re
from pathlib import Path

from dit_accel.methods.registry import methods

SPARSE = {"block_size": 128, "dense_last_steps": 0, "dense_layers": 1}
WHOLE_RUN = {"start": 0.0, "stop": 1.0}

DEFAULTS = {
    "radial": {**SPARSE, "dense_steps": 0.24, "decay_factor": 1.0, "near": "full", "sink": True},
    "sparsed": {**SPARSE, "dense_steps": 0.2, "density": 0.3},
    "sol": {**SPARSE, "block_size": 64, "dense_steps": 0.2, "beta": 1.0, "beta_last": None},
    "lite": {**SPARSE, "dense_steps": 0.1, "dense_layers": 0},
    "lvsa": {**SPARSE, "dense_steps": 0, "dense_layers": 0},
    "ultraimage": {
        "focus_min": 1.0,
        "focus_max": 1.3,
        "power": 2.0,
        "turn": None,
        "indices": None,
        "follow_above": 0.8,
        "enlarge": "picture",
    },
    "nag": {"scale": 5.0, "tau": 2.5, "alpha": 0.25, **WHOLE_RUN},
    "pag": {"scale": 3.0, "layers": None, **WHOLE_RUN},
    "softpag": {"scale": 3.0, "u": 0.5, "heads": None, **WHOLE_RUN},
    "seg": {"scale": 3.0, "layers": None, **WHOLE_RUN},
    "autoguidance": {"scale": 1.0, **WHOLE_RUN},
    "slg": {"scale": 2.8, "start": 0.01, "stop": 0.2, "layers": None},
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


def test_defaults():
    assert {name: dict(methods()[name].defaults) for name in DEFAULTS} == DEFAULTS


def test_options_of_a_config_that_nobody_fills():
    for name, options in FIXED.items():
        config = methods()[name]()
        assert {option: getattr(config, option) for option in options} == options


def test_the_page_on_guidance_has_nag_s_numbers():
    page = (Path(__file__).parents[2] / "docs" / "guidance.md").read_text()
    (numbers,) = re.findall(r"`scale`, `tau`, `alpha` \| .*?: ([\d.]+), ([\d.]+) and ([\d.]+);", page)
    defaults = methods()["nag"].defaults
    assert [float(number) for number in numbers] == [defaults["scale"], defaults["tau"], defaults["alpha"]]


def test_configs_can_t_be_written_to():
    for config in methods().values():
        assert config.__dataclass_params__.frozen
        assert config.__slots__ is not None
        assert not hasattr(config(), "__dict__")
        assert all(field.kw_only for field in dataclasses.fields(config))
