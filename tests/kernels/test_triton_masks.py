"""Masks inside tiles and a head dim of v of its own on Triton, forward and backward, against the specification."""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

from dataclasses import replace

import fa4_stand_in
import pytest
import torch
from dit_accel_kernels import (
    BackendUnavailableError,
    FrameDecay,
    Routing,
    Selection,
    TileLists,
    block_sparse_attention,
    pack_bits,
)
from dit_accel_kernels.backends.triton import plan as triton_plan
from dit_accel_kernels.checks import problem_of
from kernel_cases import WIDE, assert_within_rounding, check_against_reference, qkv
from torch import Tensor

pytestmark = [
    pytest.mark.usefixtures("unwritten_is_nan"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),  # log of a pooled tile without a key
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pairs(kind: str, num_q: int, num_k: int, heads: int = 1) -> Tensor:
    """A mask bool [G, S_q, S_k]."""
    row, key = torch.arange(num_q)[:, None], torch.arange(num_k)
    if kind == "causal":
        seen = key <= row + (num_k - num_q)
    elif kind == "window":
        seen = (key - row).abs() < 19
    elif kind == "documents":
        seen = row // 23 == key // 23
    elif kind == "rows":  # every third row sees nothing
        seen = (row % 3 > 0) & (torch.rand(num_q, num_k) < 0.5)
    else:  # "heads": masks of their own, one head of which sees nothing in its first tiles
        seen = torch.rand(heads, num_q, num_k) < torch.linspace(0.02, 0.9, heads)[:, None, None]
        seen[0, :40] = False
        return seen
    return seen[None]


def decay(num_q: int, num_k: int) -> FrameDecay:
    q_frames, k_frames = (torch.arange(n, dtype=torch.int32) // 21 - 1 for n in (num_q, num_k))
    return FrameDecay(table=torch.tensor([1.0, 0.8, 0.5]), q_frames=q_frames, k_frames=k_frames)


def gradients(backend: str, inputs: list[Tensor], tiles: TileLists, dtype: torch.dtype, **arguments) -> list[Tensor]:
    """Of q, k and v, from those of the output and the LSE."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs[:3]]
    out, lse = block_sparse_attention(*leaves, tiles, layout="bhsd", return_lse=True, backend=backend, **arguments)  # pyright: ignore
    total = (out * inputs[3].to(dtype)).sum() + (lse.masked_fill(lse.isinf(), 0) * inputs[4].to(lse.dtype)).sum()
    return list(torch.autograd.grad(total, leaves))


def check_gradients(q: Tensor, k: Tensor, v: Tensor, tiles: TileLists, backend: str = "triton", **arguments) -> None:
    inputs = [q, k, v, torch.randn(*q.shape[:3], v.shape[3]).to(q.dtype), torch.randn(q.shape[:3])]
    wide = {name: x.to(WIDE) if name == "head_scale" else x for name, x in arguments.items()}
    truth = gradients("reference", inputs, tiles, WIDE, **wide)
    yardstick = gradients("reference", inputs, tiles, q.dtype, **arguments)
    for x, y, z in zip(gradients(backend, inputs, tiles, q.dtype, **arguments), yardstick, truth, strict=True):
        assert_within_rounding(x, y, z, q.dtype)


@pytest.mark.sample
@pytest.mark.parametrize("kind", ["causal", "window", "documents", "rows", "heads"])
@pytest.mark.parametrize(
    ("shape", "blocks", "dims", "dtype"),
    [
        ((1, 2, 2, 75, 75), (32, 16), (40, 40), torch.float32),
        ((2, 2, 1, 75, 75), (32, 64), (64, 24), torch.bfloat16),
        ((1, 2, 1, 70, 130), (64, 32), (16, 128), torch.float16),
        pytest.param((1, 2, 2, 130, 150), (128, 128), (96, 64), torch.float32, marks=pytest.mark.slow),
        ((1, 2, 1, 50, 70), (24, 40), (128, 16), torch.float32),  # no chunk divides the tiles
        ((1, 2, 2, 75, 75), (9, 100), (8, 8), torch.bfloat16),
    ],
)
def test_masks_are_what_the_specification_says(kind, shape, blocks, dims, dtype):
    batch, heads, key_heads, num_q, num_k = shape
    tiles = TileLists.from_mask(pairs(kind, num_q, num_k, heads), block_q=blocks[0], block_k=blocks[1])
    assert tiles.mask_ids is not None
    q, k, _ = qkv(batch, heads, key_heads, num_q, num_k, dims[0], dtype)
    v = torch.randn(batch, key_heads, num_k, dims[1]).to(dtype)
    check_against_reference(q, k, v, tiles, "triton", layout="bhsd")
    check_gradients(q, k, v, tiles)


@pytest.mark.sample(6)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", range(8))
def test_masks_with_other_features(dtype, features):
    """Every subset of key masks, decay and the rest (head scale, token order); pooled tiles beside them always."""
    q, k, _ = qkv(2, 2, 1, 50, 50, 32, dtype)
    v = torch.randn(2, 1, 50, 48).to(dtype)
    tiles = mixed(50, 50, (16, 32), 4)
    arguments: dict = dict(scale=0.3)
    if features & 1:
        arguments |= dict(key_length=torch.tensor([50, 31]), key_mask=torch.rand(2, 50) > 0.2)
    if features & 2:
        arguments |= dict(frame_decay=decay(50, 50))
    if features & 4:
        arguments |= dict(head_scale=torch.tensor([0.7, 1.4]), token_order=torch.randperm(50))
    check_against_reference(q, k, v, tiles, "triton", layout="bhsd", **arguments)
    check_gradients(q, k, v, tiles, **arguments)


def mixed(num_q: int, num_k: int, blocks: tuple[int, int], groups: int) -> TileLists:
    """Whole, partial, pooled and skipped tiles at random."""
    rows, tiles = -(-num_q // blocks[0]), -(-num_k // blocks[1])
    states = torch.randint(0, 3, (groups, rows, tiles), dtype=torch.uint8)
    sizes = dict(block_q=blocks[0], block_k=blocks[1], num_q=num_q, num_k=num_k)
    lists = TileLists.from_states(states, **sizes)
    shape = (3, blocks[0], -(-blocks[1] // 32))
    bits = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32) & torch.randint(-(2**31), 2**31, shape).int()
    ids = torch.randint(-1, 3, (lists.tiles_exact,), dtype=torch.int32)
    return replace(lists, mask_ids=ids, mask_bits=bits).validate()


@pytest.mark.sample
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(40, 64), (64, 40), (192, 128), (16, 16)])
def test_v_has_a_head_dim_of_its_own(dims, dtype):
    """Without masks too, whose loops copy V by other addresses than K; a selection and pooled tiles beside it."""
    q, k, _ = qkv(1, 2, 1, 40, 60, dims[0], dtype)
    v = torch.randn(1, 1, 60, dims[1]).to(dtype)
    tiles = replace(mixed(40, 60, (16, 16), 2), mask_ids=None, mask_bits=None)
    keep = pack_bits(torch.rand(1, 2, tiles.query_tiles, tiles.key_tiles) < 0.6)
    for selection in (None, Selection(keep=keep, rest="pooled", routing=Routing(beta=0.2))):
        check_against_reference(q, k, v, tiles, "triton", layout="bhsd", selection=selection)
        check_gradients(q, k, v, tiles, selection=selection)


def test_head_dims_of_v_that_do_not_fit_are_named():
    q, k, _ = qkv(1, 1, 1, 20, 20, 16, torch.float32)
    with pytest.raises(BackendUnavailableError, match=r"multiple of 8 up to 256 \(found 12\)"):
        block_sparse_attention(
            q, k, torch.randn(1, 1, 20, 12), mixed(20, 20, (16, 16), 1), layout="bhsd", backend="triton"
        )


def test_a_mask_that_lets_everything_through_is_none():
    """What is masked must leave what isn't alone: bit for bit the output of the same lists without masks."""
    q, k, v = qkv(1, 2, 2, 48, 96, 32, torch.float32)
    tiles = replace(mixed(48, 96, (16, 32), 1), mask_ids=None, mask_bits=None)
    ones = torch.full((1, 16, 1), -1, dtype=torch.int32)
    masked = replace(tiles, mask_ids=torch.zeros(tiles.tiles_exact, dtype=torch.int32), mask_bits=ones)
    out, other = (block_sparse_attention(q, k, v, x, layout="bhsd", backend="triton") for x in (tiles, masked))
    assert_within_rounding(other, out, out.to(WIDE), torch.float32)


def test_masks_written_to_count():
    """Bits are read in every call; numbers are in the plan, which follows their writes."""
    q, k, v = qkv(1, 1, 1, 48, 48, 16, torch.float32)
    tiles = mixed(48, 48, (16, 16), 1)
    assert tiles.mask_bits is not None
    assert tiles.mask_ids is not None
    block_sparse_attention(q, k, v, tiles, layout="bhsd", backend="triton")
    for x in (tiles.mask_bits, tiles.mask_ids):
        x.copy_(x.flip(0))
        check_against_reference(q, k, v, tiles, "triton", layout="bhsd")


def test_hidden_tokens_take_no_part_in_the_plan_of_others():
    """Partial tiles are slow ones, whole tiles stay where they were."""
    q, k, v = qkv(1, 1, 1, 64, 64, 16, torch.float32)
    tiles = TileLists.from_mask(pairs("causal", 64, 64), block_q=16, block_k=16)
    problem = problem_of(q, k, v, tiles, layout="bhsd")
    bounds = triton_plan.row_plan(problem).bounds[0]
    assert (bounds[:, 1] - bounds[:, 0]).tolist() == [0, 1, 2, 3]  # plain
    assert (bounds[:, 3] - bounds[:, 2]).tolist() == [1, 1, 1, 1]  # slow
    rest = triton_plan.row_plan(problem, without_whole=True).bounds[0]
    assert (rest[:, 1:4] - rest[:, :3]).tolist() == [[0, 0, 1]] * 4


@pytest.mark.parametrize(("arch", "features"), [("sm_90", "mask pooled decay"), ("sm_100", "order")])
def test_flash_attention_leaves_partial_tiles_to_us(monkeypatch, arch, features):
    """Whole tiles are its blocks, those with a mask inside and pooled ones are added to its output and LSE."""
    fa4_stand_in.install(monkeypatch, arch)
    q, k, v = qkv(1, 2, 1, 270, 270, 16, torch.bfloat16)
    tiles = mixed(270, 270, (128, 128), 2)
    if "pooled" not in features:
        tiles = replace(tiles, pooled_offsets=None, pooled_indices=None)
    arguments: dict = {}
    if "mask" in features:
        arguments["key_mask"] = torch.rand(1, 270) > 0.3
    if "decay" in features:
        arguments["frame_decay"] = decay(270, 270)
    if "order" in features:
        arguments["token_order"] = torch.randperm(270)
    check_against_reference(q, k, v, tiles, "fa4", layout="bhsd", **arguments)
    check_gradients(q, k, v, tiles, "fa4", **arguments)
    [counts] = {int(call["tensors"].full_block_cnt.sum()) for call in fa4_stand_in.calls}
    assert counts < tiles.tiles_exact


def test_flash_attention_refuses_a_head_dim_of_v_of_its_own(monkeypatch):
    fa4_stand_in.install(monkeypatch, "sm_90")
    q, k, _ = qkv(1, 1, 1, 128, 128, 64, torch.bfloat16)
    v = torch.randn(1, 1, 128, 32).bfloat16()
    with pytest.raises(BackendUnavailableError, match="found 32 and 64"):
        block_sparse_attention(q, k, v, mixed(128, 128, (128, 128), 1), layout="bhsd", backend="fa4")


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_masks_with_queries_and_keys_in_eight_bits(precision):
    """Hidden keys take part in a tile's scale, as its others do; V keeps its own head dim and dtype."""
    q, k, _ = qkv(1, 2, 1, 40, 75, 32, torch.float32)
    v = torch.randn(1, 1, 75, 48)
    check_against_reference(q, k + 2, v, mixed(40, 75, (16, 32), 2), "triton", layout="bhsd", precision=precision)
