"""What every method promises, once a promise over the table of methods; a method's own file holds its rule alone."""

import json

import numpy as np
import pytest
import torch
from method_table import EDITING, TABLE
from some_cases import some
from torch._dynamo.utils import counters

import dit_accel
from dit_accel.adapters.installed import adapter_for
from dit_accel.cli.method_options import select_methods
from dit_accel.methods import PerturbedConfig, PerturbedHeadsHandler, config, registry
from dit_accel.methods.base import Model
from dit_accel.methods.compose import make_handlers
from dit_accel.methods.registry import handlers
from dit_accel.plan.tiling import visual_lists
from dit_accel.testing import MethodCase
from dit_accel.testing.promises import PROMISES
from dit_accel.testing.runs import outputs
from dit_accel.testing.tiny_models import Case, tiny_wan

MODEL = Case(adapter_for("WanTransformer3DModel"), tiny_wan())
OTHERS = {"referencecache": Case(adapter_for("FluxTransformer2DModel"), EDITING)}
"""Row of the table -> the model that it is tried on, where that is not Wan."""


@pytest.mark.parametrize("row", some(TABLE, *(row for row in TABLE if "," not in row), "sparsed, cached rest"))
def test_every_promise_is_kept(row):
    broken = {}
    for promise, check in PROMISES.items():
        try:
            check(OTHERS.get(row, MODEL), TABLE[row])
        except AssertionError as error:
            broken[promise] = str(error)
    assert not broken


def test_every_method_has_a_row():
    assert {case.config.name for case in TABLE.values()} == {
        name for name, one in handlers().items() if not one.objects
    }


def test_switches_of_the_command_line_give_the_config():
    for tried in TABLE.values():
        asked = tried.config
        options = [f"{asked.name}.{option}={json.dumps(value)}" for option, value in asked.to_dict().items()]
        (made,) = select_methods([asked.name], None, options)
        assert made.to_dict() == asked.to_dict()


def test_tiles_that_nobody_sets_are_the_usual_ones_of_the_method_that_acts_first():
    model = Model(adapter=MODEL.adapter, family=None, heads=2, layers=3)
    configs = dit_accel.SolAttention(), dit_accel.RadialAttention()
    for ordered in (configs, configs[::-1]):
        assert [handler.settings.block_size for handler in make_handlers(ordered, model)] == [128, 128]
    assert make_handlers(configs[:1], model)[0].settings.block_size == 64


SEAMS = {"attention": "radial", "forward": "easycache", "blocks": "dbcache", "positions": "rope", "guidance": "softpag"}


@pytest.mark.slow
@pytest.mark.parametrize("seam", SEAMS)
def test_compiled_blocks_give_the_same_and_make_no_more_than_two_graphs(seam):
    """One method a seam: what is compiled knows no method, only whether a call is planned."""
    tried = TABLE[SEAMS[seam]]
    model = Case(adapter_for("WanTransformer3DModel"), tiny_wan())
    with dit_accel.attach(model.transformer, tried.active, preset="none"):
        eager = outputs(model, tried.warm + 2)
    torch._dynamo.reset()
    counters.clear()
    model.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    with dit_accel.attach(model.transformer, tried.active, preset="none"):
        torch.testing.assert_close(outputs(model, tried.warm + 2), eager, rtol=1e-4, atol=1e-5)
        assert counters["stats"]["unique_graphs"] <= 2
    torch._dynamo.reset()


@config
class OwnTile(PerturbedConfig):
    """Guidance away from attention in which a tile of tokens sees itself alone."""

    name = "owntile"
    defaults = {"scale": 2.0, "start": 0.0, "stop": 1.0, "layers": "L1"}  # noqa: RUF012
    layers: str | None = None
    bits: bool = False


class OwnTileHandler(PerturbedHeadsHandler):
    config_type = OwnTile

    def perturb(self, plan, call, share, whole, context):
        """Drop tiles by lists, or by bits, for all rows: neither knows how far a head is perturbed."""
        tiling, count = self.model.tiling, self.model.tiling.tiles(context.layout.visual_tokens)
        lists = visual_lists(np.eye(count, dtype=bool), False, context.layout, tiling.block_size, str(context.device))
        if not self.settings.bits:
            return plan.with_tiles(lists, tiling.token_order(context.layout))
        keep = torch.tensor([1 << place for place in range(count)], dtype=torch.int32)[:, None]
        return plan.with_tiles(*tiling.full(context.layout)).narrow(keep=keep.expand(*call.q.shape[:2], -1, -1))


@pytest.fixture
def own_tile():
    """Register the guidance for one test; the tiles of a method without an option for them are of 128."""
    registry.register(OwnTileHandler)
    yield lambda **options: MethodCase(neutral=OwnTile(scale=0.0, **options), active=OwnTile(**options))
    registry._registered.clear()
    registry.handlers.cache_clear()


@pytest.mark.parametrize("bits", [False, True])
def test_guidance_by_any_verb_leaves_the_prompt_s_row_alone(own_tile, bits):
    for promise in ("batch", "free"):
        assert PROMISES[promise](MODEL, own_tile(bits=bits)) is None


def test_rows_that_meet_are_noticed(own_tile, monkeypatch):
    """As they did where a plan for some rows of a batch held for all of them."""
    monkeypatch.setattr(
        "dit_accel.methods.guidance.perturbed_heads.with_rows_apart", lambda plan, other, rows, call: other
    )
    with pytest.raises(AssertionError, match="prompt's row"):
        PROMISES["free"](MODEL, own_tile())
