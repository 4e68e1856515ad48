"""Heads that several processes share: what they know together, without processes."""

import itertools

import pytest
import torch

from dit_accel.attachment.shards import Ulysses
from dit_accel.plan.heads import HeadShare


class Processes:
    """Stands in for a group of processes that run one after another: a first round fills what a second one gathers."""

    def __init__(self, monkeypatch, size):
        self.rank, self.size, self.sent, self.shapes = 0, size, {}, set()
        monkeypatch.setattr("torch.distributed.get_world_size", lambda group: size)
        monkeypatch.setattr("torch.distributed.all_gather", self.all_gather)
        monkeypatch.setattr("torch.distributed.all_reduce", self.all_reduce)

    def all_gather(self, parts, sent, group):
        assert len(parts) == self.size
        assert sent.is_contiguous()
        self.shapes.add((*sent.shape, sent.dtype))
        self.sent[self.rank] = sent
        for rank, part in enumerate(parts):
            part.copy_(self.sent.get(rank, torch.zeros_like(part)))

    def all_reduce(self, x, group):
        self.sent[self.rank] = x.clone()
        x.copy_(sum(self.sent.values()))

    def run(self, function):
        """What each process gets of ``function(rank)``."""
        for _ in range(2):
            results = []
            for rank in range(self.size):
                self.rank = rank
                results.append(function(rank))
        return results


def shares(total, size):
    nothing = dict(gathered=None, positions=None, group=None, anything=True)
    return [Ulysses(rank=rank, counts=(1,) * size, **nothing).share(total) for rank in range(size)]


@pytest.mark.parametrize(("total", "size"), [(4, 1), (4, 2), (6, 3), (7, 3), (5, 4), (3, 4)])
def test_what_is_joined_is_in_the_heads_order(monkeypatch, total, size):
    parts = shares(total, size)
    for dtype, dim in itertools.product((torch.float32, torch.bool, torch.int32), range(3)):
        processes = Processes(monkeypatch, size)
        whole = torch.arange(2 * 3 * total).reshape(2, 3, total).movedim(2, dim) % 5
        whole = (whole > 2) if dtype == torch.bool else whole.to(dtype)

        def joined(rank, whole=whole, dim=dim):
            own = whole.movedim(dim, 0)[parts[rank].own].movedim(0, dim)
            assert own.shape[dim] == parts[rank].count
            return parts[rank].joined(own, dim)

        for found in processes.run(joined):
            assert found.dtype == dtype
            assert torch.equal(found, whole)
        assert len(processes.shapes) == 1  # all send alike, and no booleans
        assert next(iter(processes.shapes))[-1] == (torch.uint8 if dtype == torch.bool else dtype)


def test_sums_leave_what_is_summed(monkeypatch):
    processes, values = Processes(monkeypatch, 2), [torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])]
    for total in processes.run(lambda rank: HeadShare(start=0, count=1, total=2).summed(values[rank])):
        assert total.tolist() == [11.0, 22.0]
    assert values[0].tolist() == [1.0, 2.0]
