"""Two processes that run one transformer together skip the same steps; two that run copies of their own do not meet."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cache_ranks import work

from dit_accel.methods.caches.ranks import agreed


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return asked.getsockname()[1]


def test_numbers_are_summed_over_every_group_and_none_spreads(monkeypatch):
    """As if each group had another process with the same numbers, as `torch.distributed` sums them."""
    groups = []
    monkeypatch.setattr(dist, "all_reduce", lambda sums, group: (groups.append(group), sums.mul_(2)))
    values = [torch.tensor(1.5), torch.tensor(3), torch.tensor(float("nan"))]
    one, other, none = agreed(values, ["ring", "ulysses"])
    assert (one, other, groups) == (6.0, 12.0, ["ring", "ulysses"])
    assert none != none
    assert agreed(values[:2], []) == [1.5, 3.0]


@pytest.mark.slow
def test_two_processes():
    if not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    with mp.Manager() as manager:
        found = manager.dict()
        mp.spawn(work, (free_port(), found), nprocs=2)
        (together, alone), (other, other_alone) = found[0], found[1]
    assert together == other
    assert alone != other_alone
    assert alone.count(".") > together.count(".") > other_alone.count(".")
