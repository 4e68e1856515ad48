"""`dit-accel plan` on every family: each method, and any two together, is estimated or refused in words."""

import itertools
import json
import math
from functools import partial

import pytest
from dit_accel_pipelines import ADAPTERS

from dit_accel import ConfigError
from dit_accel.estimate.estimate import estimate
from dit_accel.estimate.sizes import pixel_multiples
from dit_accel.methods.registry import handlers, methods

FAMILIES = [(adapter, family) for adapter in ADAPTERS for family in adapter.families]
SMALL = {
    "ultravico": {"trained_frames": 3},
    "magcache": {"ratios": (1.0, 0.99, 0.98)},
    "teacache": {"polynomial": (1.0, 0.0)},
    "softpag": {"heads": "L1H0"},
    "pag": {"layers": "L1"},
    "slg": {"layers": "L1"},
}
REFUSALS = (
    r"makes no sense on|delta corrects what a sparse method leaves out|both set the|both cache|needs the input of|"
    r"would mix"
)
SPARSE = {"radial", "sol", "lite", "sparsed"}


@pytest.mark.parametrize(("adapter", "family"), FAMILIES, ids=[family.name for _, family in FAMILIES])
def test_every_method_and_pair_is_estimated_or_refused_in_words(adapter, family):
    height, width = (6 * multiple for multiple in pixel_multiples(family))
    frames = 1 if family.num_frames == 1 else 4 * family.vae[0] * family.patch[0] + 1
    configs = {name: config(**SMALL.get(name, {})) for name, config in methods().items()}
    estimated = 0
    for names in [*((name,) for name in configs), *itertools.combinations(configs, 2)]:
        chosen = [configs[name] for name in names]
        plan = partial(estimate, adapter, family, height=height, width=width, num_frames=frames)
        exclusive = [handlers()[name].exclusive for name in names]
        alike = len(exclusive) == 2 and exclusive[0] & exclusive[1]
        unsaid = "teacache" in names and adapter.signal is None
        if (
            any(name in adapter.refused for name in names)
            or alike
            or unsaid
            or ("slg" in names and {"dbcache", "firstblockcache"} & set(names))
            or ("delta" in names and not SPARSE & set(names))
        ):
            with pytest.raises(ConfigError, match=REFUSALS):
                plan(methods=chosen)
            continue
        found = plan(methods=chosen)
        estimated += 1
        values = found.to_dict()
        json.dumps(values, allow_nan=False)
        assert 0 < found.pair_density <= 1 + found.layout.tokens, names
        assert 0 <= found.dense_share <= 1
        assert math.isfinite(found.speedup)
        assert list(values["methods"]) == list(found.savings)
        assert plan(methods=chosen[::-1]).to_dict() == values
    assert estimated >= 9
