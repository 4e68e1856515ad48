"""Random calls of every kind, drawn from a number, as arrays for numpy_attention and as tensors for a backend."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from dit_accel_kernels import EXACT, FrameDecay, Routing, Selection, TileLists, Vote, pack_bits
from numpy_attention import Case

JUNK = (np.nan, np.inf, -np.inf)
CRITERIA = {"maxgap": (-6.0, -1.0), "mass": (0.01, 0.3), "budget": (0.02, 0.4)}


def drawn(seed: int, *, small: bool = False, powers: bool = False, votes: bool = True) -> Case:
    """A call: `small` for slow backends, with head dims that Triton takes; `powers`: tile sides that flex takes."""
    rng = np.random.default_rng(seed)
    few = lambda *values: values[rng.integers(len(values))]  # noqa: E731
    batch, key_heads = few(1, 1, 2, 3), few(1, 2)
    heads = key_heads * few(1, 1, 2, 3)
    dim = few(8, 16, 24, 40) if small else few(1, 3, 8, 16, 17, 40, 64)
    block_q, block_k = (few(16, 32), few(16, 32)) if powers else (few(5, 8, 16, 33), few(4, 7, 16, 16, 32))
    num_q, num_k = rng.integers(1, 50 if small else 130, 2)
    order = None
    if rng.random() < 0.6:
        num_k = num_q
        order = rng.permutation(num_q) if rng.random() < 0.5 else None
    rows, tiles = -(-num_q // block_q), -(-num_k // block_k)
    groups, shares = few(1, heads, batch * heads), few((0.3, 0, 0.7), (0.2, 0.4, 0.4), (0.2, 0.4, 0.4), (0, 1, 0))
    states = rng.choice(3, (groups, rows, tiles), p=shares)
    case = Case(
        q=rng.standard_normal((batch, heads, num_q, dim)) * few(0.5, 2.0),
        k=rng.standard_normal((batch, key_heads, num_k, dim)),
        v=rng.standard_normal((batch, key_heads, num_k, few(dim, dim, 8, 24))),
        states=states.astype(np.uint8), block_q=block_q, block_k=block_k, order=order,
        scale=few(dim**-0.5, 0.3, 1.0 / dim),
    )  # fmt: skip
    for name in ("q", "k", "v"):  # numbers that every dtype holds
        setattr(case, name, torch.from_numpy(getattr(case, name)).to(torch.bfloat16).double().numpy())
    if rng.random() < 0.3:
        case.head_scale = np.float32(rng.uniform(0.5, 1.5, (batch, heads))).astype(float)
    if rng.random() < 0.4:
        case.valid = rng.random((batch, num_k)) < few(0.9, 0.5, 0.1)
        case.valid[:, : rng.integers(0, num_k)] &= rng.random() < 0.5
    if rng.random() < 0.35:
        case.table = np.float32(np.linspace(1, 0.2, few(2, 4, 9))).astype(float)
        size = few(3, 11, 16, 32)
        case.q_frames, case.k_frames = (np.arange(n) // size - few(0, 1) for n in (num_q, num_k))
    if num_q == num_k and rng.random() < 0.3:
        case.mix = np.float32(rng.random((batch, heads)) * (rng.random((batch, heads)) < 0.7)).astype(float)
        case.mix_rows = rng.random(num_q) < 0.5 if rng.random() < 0.5 else None
    if case.valid is not None and case.mix is None and rng.random() < 0.5:
        gone = ~case.valid
        for x in (case.k, case.v):
            for b in range(batch):
                x[b, :, gone[b]] = few(*JUNK)
    if rng.random() < 0.5:
        _hide(case, rng)
    elif rng.random() < 0.6:
        _select(case, rng, votes)
    return case


def _hide(case: Case, rng: np.random.Generator) -> None:
    """A few masks for some of the tiles: causal ones, windows, dense and thin ones, and one that hides all."""
    rows, keys = np.ogrid[: case.block_q, : case.block_k]
    ahead = keys - rows + rng.integers(-8, 8)
    shape = (case.block_q, case.block_k)
    masks = np.array([ahead <= 0, abs(ahead) < 4, rng.random(shape) < 0.8, rng.random(shape) < 0.05, ahead > 99])
    chosen = rng.integers(0, len(masks), case.states.shape)
    whole = rng.random(case.states.shape) < rng.choice([0.0, 0.6])
    case.seen = np.where(whole[..., None, None], True, masks[chosen])


def _select(case: Case, rng: np.random.Generator, votes: bool) -> None:
    batch, heads, rows, tiles = *case.q.shape[:2], *case.states.shape[1:]
    if rng.random() < 0.5:
        case.keep = rng.random((batch, heads, rows, tiles)) < 0.6
        case.rest = int(rng.integers(2))
    if rng.random() < 0.4:
        case.pinned = rng.random((rows, tiles)) < 0.3
        case.pinned[:, 0] |= rng.random() < 0.5
    if rng.random() < 0.4:
        case.routing = (float(rng.choice([-0.7, 0.3, 0.9])), str(rng.choice(["diag", "exact"])))
    if votes and rng.random() < 0.7:
        case.vote = (criterion := str(rng.choice(list(CRITERIA))), float(rng.choice(CRITERIA[criterion])))
        if case.table is not None:  # so that a tile's distances have no gaps, and its section is plain to see
            case.order = None
        case.reverse = bool(rng.integers(2))
    if all(x is None for x in (case.keep, case.pinned, case.routing, case.vote)):
        case.keep = np.ones((batch, heads, rows, tiles), bool)


def tensors(case: Case, dtype: torch.dtype, seed: int) -> tuple[list[torch.Tensor], TileLists, dict[str, Any]]:
    """q, k and v, in a layout and with strides by the number, the lists and the further arguments."""
    heads_first = seed % 2 == 0
    qkv = []
    for x in (case.q, case.k, case.v):
        x = torch.from_numpy(x).to(dtype)
        if seed % 3 == 0:  # a view of something wider
            x = torch.stack([x, x], -1).flatten(-2)[..., ::2]
        qkv.append(x if heads_first else x.transpose(1, 2).contiguous())
    sizes = dict(block_q=case.block_q, block_k=case.block_k, num_q=case.q.shape[2], num_k=case.k.shape[2])
    tiles = TileLists.from_states(torch.from_numpy(case.states), **sizes)
    if case.seen is not None:
        tiles = _partial(tiles, torch.from_numpy(case.seen[case.states == EXACT]))
    arguments: dict[str, Any] = dict(layout="bhsd" if heads_first else "bshd", scale=case.scale)
    for name, x, kind in (
        ("head_scale", case.head_scale, torch.float32), ("key_mask", case.valid, torch.bool),
        ("token_order", case.order, torch.int64), ("identity_mix", case.mix, torch.float32),
        ("identity_rows", case.mix_rows, torch.bool),
    ):  # fmt: skip
        arguments[name] = None if x is None else torch.from_numpy(np.asarray(x)).to(kind)
    if case.table is not None:
        frames = {name: torch.from_numpy(getattr(case, name)).int() for name in ("q_frames", "k_frames")}
        arguments["frame_decay"] = FrameDecay(table=torch.from_numpy(case.table).float(), **frames)
    if selects(case):
        arguments["selection"] = Selection(
            keep=None if case.keep is None else pack_bits(torch.from_numpy(case.keep)),
            rest="pooled" if case.rest else "skip",
            pinned=None if case.pinned is None else pack_bits(torch.from_numpy(case.pinned)),
            routing=None if case.routing is None else Routing(beta=case.routing[0], threshold=case.routing[1]),
            vote=None if case.vote is None else Vote(criterion=case.vote[0], threshold=case.vote[1]),
            reverse=case.reverse,
        )
    return qkv, tiles, arguments


def _partial(tiles: TileLists, seen: torch.Tensor) -> TileLists:
    """Lists with what each of their exact tiles lets through, bool [nnz, block_q, block_k]."""
    masks, ids = seen.unique(dim=0, return_inverse=True) if len(seen) else (seen.new_ones(1, *seen.shape[1:]), None)
    ids = torch.zeros(0) if ids is None else ids.masked_fill(seen.all(-1).all(-1), -1)
    return replace(tiles, mask_ids=ids.int(), mask_bits=pack_bits(masks))


def selects(case: Case) -> bool:
    return any(x is not None for x in (case.keep, case.pinned, case.routing, case.vote))


def spelled(case: Case, seed: int) -> str:
    """A case in words, for an error."""
    given = [name for name in ("head_scale", "valid", "table", "order", "mix", "mix_rows", "keep", "pinned", "seen")]
    return (
        f"seed {seed}: q {case.q.shape}, v {case.v.shape}, tiles of {case.block_q} x {case.block_k} in "
        f"{len(case.states)} sets, {', '.join(x for x in given if getattr(case, x) is not None)}, rest {case.rest}, "
        f"routing {case.routing}, vote {case.vote}, reverse {case.reverse}"
    )
