"""Offloaded transformers under context parallelism give what one process gives, whatever was set up first."""

import offloaded_ranks
import pytest
import torch.distributed as dist
from offloaded_ranks import KINDS, ORDERS
from parallel_ranks import processes

from dit_accel import EasyCache, LiteAttention, RadialAttention

METHODS = (
    RadialAttention(decay_factor=0.2, near="half", sink=False, block_size=16, dense_steps=0, dense_layers=0),
    LiteAttention(threshold=-0.5, dense_steps=0, dense_layers=0),
    EasyCache(threshold=9.0, warmup_steps=1, max_consecutive=1),
)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_offloaded_processes_give_what_one_gives():
    found = processes(2, offloaded_ranks.compare, METHODS)
    assert sorted(found) == [0, 1]
    for rank in (0, 1):
        assert not isinstance(found[rank], str), found[rank]
        assert len(found[rank]) == len(KINDS) * len(ORDERS)
        for case, result in found[rank].items():
            assert not isinstance(result, str), (case, rank, result)
            away, changed = result
            assert away < 1e-5 < changed, (case, rank, result)
