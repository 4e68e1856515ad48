"""Shared by the kernel tests: random calls, and the one rule of how far a backend may stray from the specification."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from dit_accel_kernels import EXACT, FrameDecay, Selection, TileLists, block_sparse_attention, pack_bits
from dit_accel_kernels.problem import Problem
from torch import Tensor

WIDE = torch.float64
attend = partial(block_sparse_attention, layout="bhsd")
"""The attention call over [B, H, S, D]."""


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


def lists_of(states: Any, block_q: int = 16, block_k: int = 16, num_q: int = 40, num_k: int = 40) -> TileLists:
    """Lists of these states, 0 skipped, 1 pooled, 2 exact; nested lists or a tensor."""
    states = torch.as_tensor(states).to(torch.uint8)
    return TileLists.from_states(states, block_q=block_q, block_k=block_k, num_q=num_q, num_k=num_k)


def full(num_q: int, num_k: int = 0, block_q: int = 16, block_k: int = 0) -> TileLists:
    """Lists of exact tiles alone; as many keys as queries and square tiles, where nothing else is asked for."""
    return TileLists.full(num_q, num_k or num_q, block_q=block_q, block_k=block_k or block_q)


def frame_decay(
    num_q: int, num_k: int = 0, frame: int = 16, table: Any = (1.0, 0.9, 0.6), first: int = -1
) -> FrameDecay:
    """Decay of frames of so many tokens, the first of them outside the video where `first` is -1."""
    q_frames, k_frames = (torch.arange(n, dtype=torch.int32) // frame + first for n in (num_q, num_k or num_q))
    return FrameDecay(table=torch.as_tensor(table), q_frames=q_frames, k_frames=k_frames)


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


def _widened(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments in float64."""
    numbers = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and x.is_floating_point()}
    return arguments | {name: x.detach().to(WIDE).requires_grad_(x.requires_grad) for name, x in numbers.items()}


def check_against_reference(
    q: Tensor, k: Tensor, v: Tensor, tiles: TileLists, backend: str = "torch", *, logits: float = 1.0, **arguments
) -> None:
    """Output and LSE of a backend in the inputs' dtype, against the reference in float64 on the same inputs."""
    wide = [x.to(WIDE) for x in (q, k, v)]
    truth = block_sparse_attention(*wide, tiles, return_lse=True, backend="reference", **_widened(arguments))
    yardstick = block_sparse_attention(q, k, v, tiles, return_lse=True, backend="reference", **arguments)
    found = block_sparse_attention(q, k, v, tiles, return_lse=True, backend=backend, **arguments)
    alone = block_sparse_attention(q, k, v, tiles, backend=backend, **arguments)
    assert found[0].dtype == q.dtype
    assert torch.equal(found[0], alone)
    for a, b, c in zip(found, yardstick, truth, strict=True):
        assert_within_rounding(a, b, c, q.dtype, logits)


def problem_from(tiles: TileLists, q: Tensor, k: Tensor, v: Tensor, **features) -> Problem:
    """A call in [B, H, S, D] as backends get it."""
    defaults = dict(scale=q.shape[-1] ** -0.5, heads_first=True, block_q=tiles.block_q, block_k=tiles.block_k)
    return Problem(q=q, k=k, v=v, **tiles.parts, **{**defaults, **features})


@dataclass(frozen=True)
class Call:
    """A call of a backend in words; its numbers are random.

    Attributes:
        features: words among `pooled`, `length`, `mask`, `decay`, `heads` (scales of heads) and `shared` (those of all
            batches), `order`, `mix`, `inside` (masks inside tiles), `keep` and `demoted` (a selection's bits, whose
            rest is skipped or pooled), `reverse`.
        states: what the tiles are, if not random; 0 skipped, 1 pooled, 2 exact.
        size: what queries are multiplied by.
    """

    batch: int = 1
    heads: int = 2
    key_heads: int = 1
    num_q: int = 40
    num_k: int = 40
    dim: int = 16
    value_dim: int = 0
    dtype: torch.dtype = torch.float32
    blocks: tuple[int, int] = (16, 16)
    groups: int = 1
    layout: str = "bhsd"
    features: str = "pooled"
    states: tuple[tuple[int, ...], ...] = ()
    scale: float | None = None
    size: float = 1.0

    def tensors(self) -> list[Tensor]:
        """q, k and v, v with a head dim of its own where one is asked for."""
        q, k, v = qkv(self.batch, self.heads, self.key_heads, self.num_q, self.num_k, self.dim, self.dtype, self.layout)
        if self.value_dim:
            v = torch.randn(*v.shape[:3], self.value_dim).to(self.dtype)
        return [q * self.size, k, v]

    def lists(self) -> TileLists:
        """The tiles."""
        sizes = dict(num_q=self.num_q, num_k=self.num_k, block_q=self.blocks[0], block_k=self.blocks[1])
        if self.states:
            return TileLists.from_states(torch.tensor(self.states, dtype=torch.uint8), **sizes)
        tiles = random_lists(self.groups, **sizes, pooled="pooled" in self.features)
        return with_masks(tiles) if "inside" in self.features else tiles

    def arguments(self) -> dict[str, Any]:
        """What else the call is given."""
        batch, heads, num_q, num_k, words = self.batch, self.heads, self.num_q, self.num_k, self.features.split()
        arguments: dict[str, Any] = dict(layout=self.layout, scale=self.scale)
        if "length" in words:
            arguments["key_length"] = torch.tensor([num_k, num_k // 2 + 1][:batch])
        if "mask" in words:
            arguments["key_mask"] = torch.rand(batch, num_k) > 0.2
        if "decay" in words:
            arguments["frame_decay"] = frame_decay(num_q, num_k, 18)
        if "heads" in words:
            arguments["head_scale"] = torch.rand(batch, heads) + 0.5
        if "shared" in words:
            arguments["head_scale"] = torch.rand(heads) + 0.5
        if "order" in words:
            arguments["token_order"] = torch.randperm(num_q)
        if "mix" in words:
            arguments |= dict(identity_mix=torch.rand(batch, heads), identity_rows=torch.rand(num_q) > 0.5)
        if {"keep", "demoted", "reverse"} & set(words):
            bits = torch.rand(batch, heads, -(-num_q // self.blocks[0]), -(-num_k // self.blocks[1])) < 0.6
            rest = "pooled" if "demoted" in words else "skip"
            arguments["selection"] = Selection(keep=pack_bits(bits), rest=rest, reverse="reverse" in words)
        return arguments


EVERYTHING = "pooled length mask decay heads order mix"
HALF = torch.bfloat16
CALLS = {
    "one query": Call(num_q=1, num_k=3),
    "tokens first": Call(layout="bshd", heads=4, key_heads=2),
    "a list a head": Call(heads=4, key_heads=2, groups=4, num_q=63, num_k=31),
    "a list a head and batch": Call(batch=2, heads=6, key_heads=3, groups=12, num_q=17, num_k=100, layout="bshd"),
    "nothing pooled": Call(num_q=65, num_k=64, features=""),
    "one skipped tile": Call(states=((0,),), blocks=(64, 64)),
    "one pooled tile": Call(states=((1,),), blocks=(64, 64), num_k=31),
    "one exact tile": Call(states=((2,),), blocks=(64, 64), num_k=1, dtype=HALF),
    "head dim 8": Call(dim=8, dtype=torch.float16),
    "head dim 72": Call(dim=72, dtype=HALF),
    "head dim 96": Call(dim=96),
    "head dim 256": Call(dim=256, num_k=20),
    "odd tiles": Call(blocks=(9, 11), dtype=torch.float16),
    "tiles that no chunk divides": Call(blocks=(24, 48), num_q=70, num_k=150),
    "tiles of several chunks": Call(blocks=(256, 192), num_q=300, num_k=400, heads=1, dtype=HALF),
    "many pooled tiles": Call(blocks=(32, 8), num_k=8 * 41 - 3, dim=8),
    "large logits": Call(size=200.0),
    "no scale": Call(scale=0.0),
    "a negative scale": Call(scale=-0.4, features="pooled decay"),
    "keys left out": Call(batch=2, features="pooled length mask", dtype=HALF),
    "decay in float16": Call(features="pooled decay", num_q=70, num_k=70, dtype=torch.float16),
    "everything": Call(batch=2, groups=2, features=EVERYTHING),
    "everything, narrow": Call(batch=2, features=EVERYTHING, dtype=HALF, scale=0.3),
    "masks inside": Call(features="inside", groups=2, num_q=75, num_k=75, blocks=(32, 16)),
    "masks inside and a head dim of v": Call(
        batch=2, features="pooled inside length mask shared", dim=40, value_dim=24, dtype=HALF, blocks=(16, 32)
    ),
    "masks inside, decay and order": Call(features="pooled inside decay order", value_dim=48, dtype=torch.float16),
    "bits that skip": Call(batch=2, heads=6, key_heads=3, groups=12, features="pooled keep mask heads"),
    "bits that pool": Call(features="pooled demoted decay order", groups=2, value_dim=8),
    "bits, last tile first": Call(features="pooled keep reverse", dtype=HALF),
}
"""Calls by what is odd about them; random ones of every kind are drawn in `fuzz_cases`."""


def gradients(backend: str, leaves: list[Tensor], seeds: list[Tensor], tiles: TileLists, **arguments) -> list[Tensor]:
    """Of q, k, v and those of the arguments that require one, from gradients of the output and of the LSE."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out, lse = block_sparse_attention(*leaves, tiles, return_lse=True, backend=backend, **arguments)
    total = (out * seeds[0].to(out.dtype)).sum() + (lse.masked_fill(lse.isinf(), 0) * seeds[1].to(lse.dtype)).sum()
    more = [x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad]
    return list(torch.autograd.grad(total, [*leaves, *more]))


def check_gradients(
    q: Tensor, k: Tensor, v: Tensor, tiles: TileLists, backend: str, *, logits: float = 1.0, **arguments
) -> None:
    """Gradients of a backend in the inputs' dtype against those of the reference in float64 on the same inputs."""
    if "head_scale" in arguments and q.dtype == torch.float32:  # whose scales have a gradient in their dtype
        arguments["head_scale"] = arguments["head_scale"].clone().requires_grad_()
    shape = q.shape[:3] if arguments.get("layout") == "bhsd" else q.transpose(1, 2).shape[:3]
    seeds = [torch.randn(*q.shape[:3], v.shape[3]), torch.randn(shape)]
    truth = gradients("reference", [x.to(WIDE) for x in (q, k, v)], seeds, tiles, **_widened(arguments))
    yardstick = gradients("reference", [q, k, v], seeds, tiles, **arguments)
    for x, y, z in zip(gradients(backend, [q, k, v], seeds, tiles, **arguments), yardstick, truth, strict=True):
        assert x.dtype == q.dtype
        assert_within_rounding(x, y, z, q.dtype, logits)
