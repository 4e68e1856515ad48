"""Skipped blocks under diffusers' group offloading: what runs has its weights, what was skipped does not keep its own.

There is no second device on a CPU: what is sent away is laid on the meta device here, where nothing can be computed.
"""

import pytest
import torch
from block_calls import LAYERS, forward, six_blocks
from diffusers.hooks import group_offloading
from torch import nn
from wan_tiny import denoise

import dit_accel
from dit_accel import DBCache, DBPrune, ProfilingCache

HERE, AWAY = torch.device("cpu"), torch.device("meta")
ONCE = dict(every=100, warmup_steps=0)
FOREVER = dict(threshold=1e9, warmup_steps=0, last_steps=0)


class Stream:
    """Copies at once, and counts how often it is waited for."""

    def __init__(self):
        self.waits = 0

    def synchronize(self):
        self.waits += 1


@pytest.fixture
def moves(monkeypatch):
    """What was fetched and sent away, by the groups' names, with the moving replaced."""
    noted = []

    def tensors(group):
        return [(module, name) for one in group.modules for module in one.modules() for name in module._parameters]

    def offload(group):
        group.kept = getattr(group, "kept", {})
        for module, name in tensors(group):
            if module._parameters[name] is not None and not module._parameters[name].is_meta:
                group.kept[module, name] = module._parameters[name]
                module._parameters[name] = nn.Parameter(module._parameters[name].to(AWAY), requires_grad=False)
        noted.append(("away", group))

    def onload(group):
        for (module, name), parameter in group.kept.items():
            module._parameters[name] = parameter
        noted.append(("here", group))

    monkeypatch.setattr(group_offloading.ModuleGroup, "offload_", offload)
    monkeypatch.setattr(group_offloading.ModuleGroup, "onload_", onload)
    monkeypatch.setattr(group_offloading.ModuleGroup, "_init_cpu_param_dict", lambda group: {})
    return noted


def offload(model, size, stream=None):
    config = group_offloading.GroupOffloadingConfig(
        onload_device=HERE, offload_device=AWAY, offload_type=group_offloading.GroupOffloadingType.BLOCK_LEVEL,
        non_blocking=False, record_stream=False, low_cpu_mem_usage=False, num_blocks_per_group=size, stream=stream,
    )  # fmt: skip
    group_offloading._apply_group_offloading(model, config)


def left_here(model):
    return [index for index, block in enumerate(model.blocks) if not next(block.parameters()).is_meta]


def test_the_stand_in_offloads(moves):
    plain = denoise(six_blocks(), 2)
    for size, stream in ((2, None), (1, Stream())):
        model = six_blocks()
        offload(model, size, stream)
        assert left_here(model) == []
        assert torch.equal(denoise(model, 2), plain)
        assert left_here(model) == []
        with pytest.raises(RuntimeError, match="device"):
            model.blocks[1].attn1.to_q(torch.zeros(1, 32))
    assert stream.waits > 0


@pytest.mark.parametrize(
    ("size", "streams", "first"),
    [(1, False, "offload"), (2, False, "cache"), (3, False, "offload"), (LAYERS, False, "offload")]
    + [(1, True, first) for first in ("cache", "offload")],
)
@pytest.mark.parametrize(
    "config",
    [
        ProfilingCache(blocks="0, 2-3, 5", **ONCE),
        ProfilingCache(blocks="1-4", **ONCE),
        ProfilingCache(blocks="0-5", **ONCE),
        DBCache(first_blocks=1, last_blocks=1, **FOREVER),
        DBPrune(first_blocks=2, **FOREVER),
    ],
    ids=["apart", "middle", "all", "dbcache", "dbprune"],
)
def test_blocks_beside_skipped_ones_have_their_weights_and_nothing_stays(moves, config, size, streams, first):
    plain = six_blocks()
    with dit_accel.attach(plain, config):
        expected = denoise(plain, 4)
    model = six_blocks()
    if first == "offload":
        offload(model, size, Stream() if streams else None)
    with dit_accel.attach(model, config):
        if first == "cache":
            offload(model, size, Stream() if streams else None)
        assert torch.equal(denoise(model, 4), expected)
        assert left_here(model) == []


def test_a_group_that_is_skipped_whole_is_never_fetched(moves):
    model = six_blocks()
    offload(model, 2)
    groups = [block._diffusers_hook.get_hook("group_offloading").group for block in model.blocks]
    with dit_accel.attach(model, ProfilingCache(blocks="2-3", **ONCE)):
        forward(model, 0)
        moves.clear()
        forward(model, 1)
    ours = [(what, groups.index(group) // 2) for what, group in moves if group in groups]
    assert ours == [("here", 0), ("away", 0), ("here", 2), ("away", 2)]
