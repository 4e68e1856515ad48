"""Chunks that come by tensor descriptors are those that come by pointers, bit for bit, in Triton's interpreter."""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

import pytest
import torch
from dit_accel_kernels import FrameDecay, block_sparse_attention_eager
from dit_accel_kernels.backends.triton import attend as triton_backend
from kernel_cases import qkv, random_lists


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("feature", ["plain", "decay", "head scale"])
def test_bulk_copies_change_nothing(layout, feature, monkeypatch):
    q, k, v = qkv(2, 4, 2, 70, 70, 16, torch.float32, layout)
    tiles = random_lists(1, 70, 70, 32, 32)
    frames = (torch.arange(70) // 32).int()
    arguments: dict = {
        "plain": {},
        "decay": {"frame_decay": FrameDecay(table=torch.tensor([0.9, 0.5]), q_frames=frames, k_frames=frames)},
        "head scale": {"head_scale": torch.tensor([0.5, -1.0, 2.0, 1.0])},
    }[feature]
    made = []
    descriptors = triton_backend._descriptors

    def recorded(*given):
        made.append(descriptors(*given))
        return made[-1]

    monkeypatch.setattr(triton_backend, "_descriptors", recorded)
    found = []
    for bulk in (False, True):
        monkeypatch.setattr(triton_backend, "bulk_copies", lambda *_, bulk=bulk: bulk)
        found.append(block_sparse_attention_eager(q, k, v, tiles, layout=layout, backend="triton", **arguments))
    assert torch.equal(*found)
    assert [x is not None for pair in made for x in pair] == [False] * 4 + [True] * 4  # keys and values, their means


def test_what_descriptors_cannot_describe_comes_by_pointers(monkeypatch):
    monkeypatch.setattr(triton_backend, "bulk_copies", lambda *_: True)
    descriptors, made = triton_backend._descriptors, []
    monkeypatch.setattr(triton_backend, "_descriptors", lambda *given: made.append(descriptors(*given)) or made[-1])
    for dim, block, extra, order in ((24, 32, 0, False), (16, 24, 0, False), (16, 32, 1, False), (16, 32, 0, True)):
        q = torch.randn(1, 2, 40, dim + extra)[..., :dim]  # with one more column, rows are not 16 bytes apart
        tiles = random_lists(1, 40, 40, block, block, pooled=False)
        arguments: dict = {"token_order": torch.randperm(40)} if order else {}
        block_sparse_attention_eager(q, q, q, tiles, layout="bhsd", backend="triton", **arguments)
    assert made == [(None, None)] * 4
