"""Shared by the kernel tests: random calls, and the one rule of how far a backend may stray from the specification."""

from dataclasses import replace

import torch
from dit_accel_kernels import EXACT, TileLists, block_sparse_attention, pack_bits
from torch import Tensor

WIDE = torch.float64


def qkv(
    batch: int, heads: int, key_heads: int, num_q: int, num_k: int, dim: int, dtype: torch.dtype, layout: str = "bhsd"
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v in `layout`."""
    q = torch.randn(batch, heads, num_q, dim).to(dtype)
    k, v = (torch.randn(batch, key_heads, num_k, dim).to(dtype) for _ in range(2))
    return (q, k, v) if layout == "bhsd" else (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))


def random_lists(groups: int, num_q: int, num_k: int, block_q: int, block_k: int, *, pooled: bool = True) -> TileLists:
    """Random states; with enough block rows, one is empty, one only pooled and one full."""
    shape = (groups, -(-num_q // block_q), -(-num_k // block_k))
    states = torch.randint(0, 3 if pooled else 2, shape, dtype=torch.uint8)
    states = states if pooled else states * EXACT
    for row, value in enumerate((0, 1 if pooled else 0, EXACT)):
        if shape[1] > row + 1:
            states[0, row] = value
    return TileLists.from_states(states, block_q=block_q, block_k=block_k, num_q=num_q, num_k=num_k).validate()


def with_masks(tiles: TileLists) -> TileLists:
    """The same lists with masks inside about half of their exact tiles: dense and thin ones, and one that hides all."""
    masks = torch.rand(3, tiles.block_q, tiles.block_k) < torch.tensor([0.7, 0.1, 0.0])[:, None, None]
    ids = torch.randint(0, 3, (tiles.tiles_exact,), dtype=torch.int32)
    ids[torch.rand(len(ids)) < 0.5] = -1
    return replace(tiles, mask_ids=ids, mask_bits=pack_bits(masks)).validate()


def assert_within_rounding(
    found: Tensor, yardstick: Tensor, truth: Tensor, dtype: torch.dtype, logits: float = 1.0
) -> None:
    """Error <= 2 x the specification's own in `dtype`, plus one rounding step; in maximum and mean square.

    The specification's largest error counts as at least four times its mean square one: with few elements it may be
    small by luck. With logits as large as `logits` it is so many steps: a logit's rounding changes its weight by them.
    """
    assert found.shape == truth.shape
    endless = truth.isinf()
    assert torch.equal(found.isinf(), endless)
    found, yardstick, truth = (x.to(WIDE).masked_fill(endless, 0.0) for x in (found, yardstick, truth))
    step = torch.finfo(dtype).eps

    def largest(x: Tensor) -> Tensor:
        return x.abs().max()

    def mean(x: Tensor) -> Tensor:
        return x.square().mean().sqrt()

    own = mean(yardstick - truth)
    for norm, least in ((largest, 4 * own), (mean, own)):
        error = norm(found - truth)
        allowed = 2 * torch.maximum(norm(yardstick - truth), least) + logits * step * norm(truth)
        assert error <= allowed, f"error {float(error):.3g}, allowed {float(allowed):.3g}"


def check_against_reference(
    q: Tensor, k: Tensor, v: Tensor, tiles: TileLists, backend: str = "torch", *, logits: float = 1.0, **arguments
) -> None:
    """Output and LSE of a backend in the inputs' dtype, against the reference in float64 on the same inputs."""
    wide = {name: x.to(WIDE) if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in arguments.items()}
    truth = block_sparse_attention(
        q.to(WIDE), k.to(WIDE), v.to(WIDE), tiles, return_lse=True, backend="reference", **wide
    )
    yardstick = block_sparse_attention(q, k, v, tiles, return_lse=True, backend="reference", **arguments)
    found = block_sparse_attention(q, k, v, tiles, return_lse=True, backend=backend, **arguments)
    alone = block_sparse_attention(q, k, v, tiles, backend=backend, **arguments)
    assert found[0].dtype == q.dtype
    assert torch.equal(found[0], alone)
    for a, b, c in zip(found, yardstick, truth, strict=True):
        assert_within_rounding(a, b, c, q.dtype, logits)
