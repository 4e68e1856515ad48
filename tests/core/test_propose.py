"""A proposed adapter: what a tiny model's run shows is what the adapter of its family says."""

from functools import partial

import pytest
import tiny_models
import torch
from torch import nn

from dit_accel import ConfigError
from dit_accel.adapters.installed import adapters
from dit_accel.testing import TinyModel, propose_adapter


@pytest.mark.parametrize(
    ("name", "grid", "alone"),
    [
        ("wan", {}, ("blocks.*.attn2",)),
        ("cogvideox", {"frames_axis": 1, "text": "before"}, ()),
        ("hunyuan-video", {"text": "after"}, ("context_embedder.token_refiner.refiner_blocks.*.attn",)),
        ("sd3", {"frames_axis": None, "text": "after"}, ()),
        ("cogview", {"frames_axis": None, "text": "before"}, ()),
        ("ltx", None, ("transformer_blocks.*.attn2",)),
    ],
)
def test_attention_text_and_blocks_are_those_of_the_adapter(name, grid, alone):
    found, known = propose_adapter(tiny_models.MODELS[name][0]), adapters()[name]
    assert set(found.adapter.self_attention) == {*known.self_attention}
    assert found.left_alone == alone
    assert found.grid_found == (grid is not None)
    options = found.adapter.grid.keywords if isinstance(found.adapter.grid, partial) else {}
    assert options == (grid or {})
    assert ("grid=..." in found.source()) == (grid is None)
    if found.adapter.blocks is not None:
        assert known.blocks is not None
        assert {(one.pattern, one.takes, one.gives) for one in found.adapter.blocks} <= {
            (one.pattern, one.takes, one.gives) for one in known.blocks
        }
    if found.rope_of is not None:
        assert found.rope_of == name


def test_a_model_without_attention_is_refused():
    class Plain(nn.Module):
        config = None

        def forward(self, hidden_states, return_dict=True):
            return (hidden_states,)

    tiny = TinyModel(transformer=Plain, config={}, inputs=lambda batch: dict(hidden_states=torch.zeros(batch, 4)))
    with pytest.raises(ConfigError, match=r"Plain.*scaled_dot_product_attention"):
        propose_adapter(tiny)
