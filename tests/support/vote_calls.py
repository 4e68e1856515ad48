"""Calls that vote, for the tests of what votes guarantee on every backend.

A backend that counts votes joins by its name in BACKENDS.
"""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

import math
from collections.abc import Callable

import pytest
import torch
from dit_accel_kernels import Selection, TileLists, Vote, block_sparse_attention, pack_bits, unpack_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

BACKENDS = ("reference", "torch", "triton")
EVERY = pytest.mark.parametrize("backend", BACKENDS)
DIRECTIONS = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
CRITERIA = [Vote(threshold=-2.0), Vote(criterion="mass", threshold=0.05), Vote(criterion="budget", threshold=0.1)]
VOTES = pytest.mark.parametrize("vote", CRITERIA, ids=lambda vote: vote.criterion)
WIDE = torch.float64
BLOCK, ROWS, COUNT = 16, 2, 4
NUM_Q, NUM_K = 24, 58  # both end in a ragged tile
TILES = TileLists.full(NUM_Q, NUM_K, block_q=BLOCK, block_k=BLOCK)
ALL = torch.ones(1, 2, ROWS, COUNT, dtype=torch.bool)
SCALE = 0.25
OFF = 100 * torch.finfo(torch.float32).eps  # how near a threshold, relatively, a float32 gap may fall on either side
SEEDS = st.integers(0, 2**31)


def property_of(**strategies) -> Callable:
    """Make a test of every backend from a check of one drawn example; the interpreter, being slow, gets two."""

    def wrap(check):
        @EVERY
        def test(backend):
            few = backend == "triton"

            @settings(max_examples=2 if few else 25, deadline=None, derandomize=few, database=None)
            @given(**strategies)
            def example(**drawn):
                check(backend, **drawn)

            example()

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return wrap


def dtype_of(backend: str) -> torch.dtype:
    return torch.float32 if backend == "triton" else WIDE


def inputs(backend: str, seed: int, spread: float = 1.5) -> tuple[Tensor, Tensor, Tensor]:
    """Queries about one direction, keys whose length along it depends on the tile: votes find something to drop."""
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(1, 2, n, 16, generator=generator, dtype=WIDE) for n in (NUM_Q, NUM_K, NUM_K)]
    length = spread * torch.randn(1, 2, COUNT, generator=generator, dtype=WIDE)
    k = length.repeat_interleave(BLOCK, 2)[:, :, :NUM_K, None] + 0.2 * draw[1]
    return tuple(x.to(dtype_of(backend)) for x in (1 + 0.2 * draw[0], k, draw[2]))


def call(backend: str, q: Tensor, k: Tensor, v: Tensor, tiles: TileLists = TILES, decay=None, **selection):
    """Output, LSE and, with a vote, the bits of the next call as bool."""
    for name in ("keep", "pinned"):
        if name in selection:
            selection[name] = pack_bits(selection[name])
    out, lse, *bits = block_sparse_attention(
        q, k, v, tiles, layout="bhsd", scale=SCALE, return_lse=True, backend=backend, frame_decay=decay,
        selection=Selection(**selection),
    )  # fmt: skip
    return out, lse, *(unpack_bits(x, tiles.key_tiles) for x in bits)


def some_tiles(seed: int, share: float = 0.7) -> Tensor:
    """Random bits, the first tile of every block row among them."""
    keep = torch.rand(1, 2, ROWS, COUNT, generator=torch.Generator().manual_seed(seed)) < share
    keep[..., 0] = True
    return keep


def logits(q: Tensor, k: Tensor) -> Tensor:
    """Of every query and key in float64, log2 units."""
    return q.to(WIDE) @ k.to(WIDE).mT * SCALE * math.log2(math.e)


def by_token(bits: Tensor) -> Tensor:
    """Bits [..., NQ, NK] for every query and key."""
    return bits.repeat_interleave(BLOCK, 2)[:, :, :NUM_Q].repeat_interleave(BLOCK, 3)[..., :NUM_K]
