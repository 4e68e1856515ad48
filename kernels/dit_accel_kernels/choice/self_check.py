"""Whether a kernel is right on this machine: a small call of the same kind beside the float64 specification.

About 1,000 tokens with lists that differ by head, a ragged last tile, a row of one tile and one without any. The bound
is by the dtype, a few times what dense attention in that dtype is off by ("Is Flash Attention Stable?", 2405.02803).
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import reference
from ..bits import unpack_bits
from ..checks import problem_of
from ..features import FrameDecay
from ..problem import Problem
from ..selection import Selection, Vote
from ..tiles import TileLists

TOKENS = 1000
SECONDS = 120.0
"""A kernel that takes longer for its check is taken for hanging; ten times that where it may have to compile."""

OFF = {torch.bfloat16: 8e-3, torch.float16: 2e-3, torch.float32: 2e-5, torch.float64: 1e-12}
"""Largest error of the output, relative in the 2-norm, of each head; rows may be off four times as much."""
TENSOR_FLOAT = 2e-3  # of float32 on a GPU, whose tensor cores keep ten bits
VOTES_ALIKE = 0.98  # of the bits that votes keep: those at the threshold may fall on either side


class Kind(NamedTuple):
    """What a self check holds for: the calls of one device that differ in sizes and values alone."""

    device: torch.device
    dtype: torch.dtype
    dim: int
    value_dim: int
    tile: tuple[int, int]
    features: frozenset[str]

    def __str__(self) -> str:
        """The kind in words, as it stands in reports and in the file of measurements."""
        dims = str(self.dim) if self.dim == self.value_dim else f"{self.dim} and {self.value_dim}"
        dtype, more = str(self.dtype).removeprefix("torch."), ", ".join(sorted(self.features))
        return f"{dtype}, head dim {dims}, tiles {self.tile[0]} x {self.tile[1]}" + (f", {more}" if more else "")


def kind_of(problem: Problem) -> Kind:
    """The kind of a call."""
    narrows = problem.selection is not None
    features = {
        "votes": problem.votes, "selection": narrows, "pooled tiles": problem.may_pool, "LSE": problem.return_lse,
        "masks in tiles": problem.mask_ids is not None, "decay": problem.decay is not None,
        "scales of heads": problem.head_scale is not None, "shared key heads": problem.q.shape[1] != problem.k.shape[1],
        "hidden keys": any(x is not None for x in (problem.key_length, problem.key_mask, problem.key_valid)),
    }  # fmt: skip
    dims, tile = (problem.q.shape[-1], problem.v.shape[-1]), (problem.block_q, problem.block_k)
    names = frozenset(name for name, there in features.items() if there)
    return Kind(problem.q.device, problem.q.dtype, *dims, tile, names)


def sample(kind: Kind) -> Problem:
    """A call of a kind, in float64 on the CPU; always the same one, which draws nothing from the caller's generator."""
    random = torch.Generator().manual_seed(0)
    most = max(kind.tile)
    tokens = max(TOKENS // most, 4) * most + max(1, most * 3 // 8)
    heads, key_heads, batch = 2, 1 if "shared key heads" in kind.features else 2, 1
    q, k, v = (
        torch.randn(batch, count, tokens, dim, generator=random, dtype=torch.float64).to(kind.dtype)
        for count, dim in ((heads, kind.dim), (key_heads, kind.dim), (key_heads, kind.value_dim))
    )
    grid = [-(-tokens // side) for side in kind.tile]
    states = 2 * (torch.rand(heads, *grid, generator=random) < 0.5).to(torch.uint8)
    if "pooled tiles" in kind.features:
        states = torch.where(torch.rand(heads, *grid, generator=random) < 0.3, 1, states)
    states[:, 0] = 0  # a row that sees nothing
    states[:, 1], states[:, 1, 1] = 0, 2  # and one that sees little
    states[:, -1, -1] = 2
    lists = TileLists.from_states(states, block_q=kind.tile[0], block_k=kind.tile[1], num_q=tokens, num_k=tokens)
    if "masks in tiles" in kind.features:
        count, shape = lists.exact_indices.numel(), (1, kind.tile[0], -(-kind.tile[1] // 32))
        ids = torch.where(torch.rand(count, generator=random) < 0.3, 0, -1).to(torch.int32)
        bits = torch.randint(-(1 << 31), 1 << 31, shape, generator=random, dtype=torch.int64)
        lists = replace(lists, mask_ids=ids, mask_bits=bits.to(torch.int32))
    frames, vote = (torch.arange(tokens) // 150).to(torch.int32), Vote() if "votes" in kind.features else None
    features: dict[str, tuple[str, Any]] = {
        "decay": ("frame_decay", FrameDecay(table=torch.linspace(1.0, 0.6, 5), q_frames=frames, k_frames=frames)),
        "scales of heads": ("head_scale", torch.tensor([0.8, 1.1])),
        "hidden keys": ("key_valid", (torch.arange(tokens) < tokens - tokens // 9)[None]),
        "selection": ("selection", Selection(vote=vote)),
        "LSE": ("return_lse", True),
    }
    return problem_of(
        q, k, v, lists, layout="bhsd", **dict(features[name] for name in features if name in kind.features)
    )


def fault(kind: Kind, attend: Callable[[Problem], tuple[Any, ...]], *, compiles: bool = False) -> str | None:
    """What is wrong with a kernel's results for calls of a kind, in words, or None; it may raise or hang."""
    ended: list[str | None] = []

    def judge() -> None:
        try:
            with torch.no_grad(), torch.autocast(kind.device.type, enabled=False):
                ended.append(_judged(kind, attend))
        except Exception as error:
            text = " ".join(str(error).split())
            ended.append(f"it failed with {type(error).__name__}: {text[:200]}")

    thread = threading.Thread(target=judge, daemon=True, name="dit-accel self check")
    thread.start()
    limit = SECONDS * (10 if compiles else 1)
    thread.join(limit)
    return ended[0] if ended else f"it took more than {limit:.0f} s"


def _judged(kind: Kind, attend: Callable[[Problem], tuple[Any, ...]]) -> str | None:
    problem = sample(kind)
    wide = replace(problem, **{name: getattr(problem, name).double() for name in "qkv"})
    out, lse, _, kept = reference.attend(wide)
    given = attend(on_device(problem, kind.device))
    own = given[0].detach().double().cpu()
    off = TENSOR_FLOAT if kind.dtype == torch.float32 and kind.device.type != "cpu" else OFF[kind.dtype]
    if own.shape != out.shape:
        return f"its output is {list(own.shape)} for {list(out.shape)}"
    if not own.isfinite().all():
        return "its output has values that are no numbers"
    rows = (own - out).norm(dim=-1)
    worst = float((rows.norm(dim=-1) / out.norm(dim=(-2, -1))).max())
    if worst > off or float((rows - 4 * off * out.norm(dim=-1)).max()) > off:
        full = TileLists.full(problem.num_q, problem.num_k, block_q=kind.tile[0], block_k=kind.tile[1])
        dense = reference.attend(replace(wide, **full.parts, selection=None))[0]
        if float((own - dense).norm()) < float((own - out).norm()):
            return "it does not follow its lists: its output is that of dense attention"
        return f"its output is off by {worst:.2g} (bound {off:.2g}, or four times that in a row)"
    if "LSE" in kind.features:
        difference = (given[1].double().cpu() - lse).nan_to_num(0.0, torch.inf, torch.inf)  # both -inf: no difference
        if float(difference.abs().max()) > 4 * off:
            return f"its LSE is off by {float(difference.abs().max()):.2g} (bound {4 * off:.2g})"
    if kept is not None:
        bits = (unpack_bits(x.cpu(), problem.key_tiles) for x in (given[3], kept))
        alike = float(torch.eq(*bits).double().mean())
        if alike < VOTES_ALIKE:
            return f"its votes agree in {alike:.0%} of the tiles (bound {VOTES_ALIKE:.0%})"
    return None


def on_device(problem: Problem, device: torch.device) -> Problem:
    """A call with all tensors on a device."""
    tensors = {
        name: value.to(device)
        for name in problem.__dataclass_fields__
        if isinstance(value := getattr(problem, name), Tensor)
    }
    decay = None if problem.decay is None else tuple(x.to(device) for x in problem.decay)
    return replace(problem, **tensors, decay=decay)
