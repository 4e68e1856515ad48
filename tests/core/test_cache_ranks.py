"""Two processes that run one transformer together skip the same steps; two that run copies of their own do not meet."""

import socket

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from cache_ranks import work


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return asked.getsockname()[1]


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
