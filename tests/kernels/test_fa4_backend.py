"""The fa4 backend: its lists and masks by a stand-in of flash-attn-4, what it refuses, and the real one's compiler."""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

import importlib.metadata
import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import fa4_stand_in
import pytest
import torch
from dit_accel_kernels import BackendUnavailableError, Selection, Vote, fa4_requirement
from dit_accel_kernels.backends import fa4, library
from kernel_cases import attend, check_against_reference, frame_decay, full, lists_of, qkv, random_lists

CPU = torch.device("cpu")
LISTS = random_lists(1, 300, 300, 128, 128)
TABLE = (1.0, 0.9, 0.5, 0.2)  # of frames of 37 tokens, fewer than a tile has


def half(num_q: int = 300, num_k: int = 300, heads: int = 1, dim: int = 16) -> tuple[torch.Tensor, ...]:
    return qkv(1, heads, heads, num_q, num_k, dim, torch.bfloat16)


def installed() -> bool:
    try:
        importlib.metadata.version(fa4.PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


NEEDS_PACKAGE = pytest.mark.skipif(not installed(), reason="flash-attn-4 is not installed (the extra fa4)")


@pytest.fixture(params=["sm_90", "sm_100"])
def arch(request, monkeypatch, unwritten_is_nan) -> str:
    """Both ways of cutting queries into blocks."""
    fa4_stand_in.install(monkeypatch, request.param)
    return request.param


def test_full_blocks_hold_what_no_mask_touches(monkeypatch):
    """Five query tiles of 128; on sm_100 pairs of them: what both list is full, what one lists is partial."""
    states = [[2, 2, 0], [2, 0, 2], [0, 1, 0], [0, 0, 0], [0, 2, 2]]
    given = half(530, 300)

    def lists(arch: str, **arguments) -> tuple[list, list]:
        fa4_stand_in.install(monkeypatch, arch)
        attend(*given, lists_of(states, 128, 128, 530, 300), backend="fa4", **arguments)
        tensors = fa4_stand_in.calls[-1]["tensors"]
        assert tensors.block_size == ((128, 128) if arch == "sm_90" else (256, 128))
        return tuple(
            [row[:n].tolist() for n, row in zip(counts[0, 0].tolist(), indices[0, 0], strict=True)]
            for counts, indices in zip(tensors[:4:2], tensors[1:4:2], strict=True)
        )

    assert lists("sm_90") == ([[]] * 5, [[0, 1], [0, 2], [], [], [1, 2]])
    assert fa4_stand_in.calls[-1]["mask_mod"] is None
    valid = torch.ones(1, 300, dtype=torch.bool)
    valid[0, 130] = valid[0, 256:] = False
    assert lists("sm_90", key_mask=valid) == ([[1], [], [], [], [1]], [[0], [0], [], [], []])
    assert lists("sm_100") == ([[1, 2], [], []], [[0], [], [1, 2]])


def test_blocks_and_decay_are_remembered_with_what_they_come_from(arch):
    given, tiles, mask = half(), random_lists(1, 300, 300, 128, 128), torch.ones(1, 300, dtype=torch.bool)
    for arguments in ({}, {}, dict(key_mask=mask), dict(key_mask=mask)):
        attend(*given, tiles, backend="fa4", **arguments)
    mask[0, :100] = False  # masks may change in place
    attend(*given, tiles, backend="fa4", key_mask=mask)
    first, second, third, fourth, fifth = (call["tensors"].full_block_idx for call in fa4_stand_in.calls)
    assert (second is first, fourth is third, fifth is not fourth) == (True, True, True)
    fa4_stand_in.calls.clear()
    order = torch.randperm(300)
    places, decay, tiles = order.argsort(), frame_decay(300, frame=37, table=TABLE), full(300, 300, 256, 128)
    for changed in (False, False, True):
        if changed:
            order.copy_(torch.arange(300))
        attend(*given, tiles, backend="fa4", frame_decay=decay, token_order=order)
    first, second, third = (call["aux_tensors"][-2:] for call in fa4_stand_in.calls)
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert torch.equal(third[0], first[0][:, places])
    assert fa4_stand_in.calls[0]["mask_mod"] is None


def test_what_it_does_not_execute_is_refused(arch):
    votes, small = dict(selection=Selection(vote=Vote())), random_lists(1, 300, 300, 64, 64)
    wide = r"needs bfloat16 or float16 \(found torch.float32\): use 'triton' or 'auto'"
    for dtype, dim, tiles, arguments, text in (
        (torch.bfloat16, 16, LISTS, votes, ".*no votes"), (torch.float32, 16, LISTS, {}, wide),
        (torch.bfloat16, 20, LISTS, {}, r".*head dim.*8.*128 \(found 20\)"),
        (torch.bfloat16, 136, LISTS, {}, r".*head dim.*8.*128 \(found 136\)"),
        (torch.bfloat16, 16, small, {}, r".*tiles.*128 or 256 queries x 128 keys \(found 64 x 64\)"),
    ):  # fmt: skip
        with pytest.raises(BackendUnavailableError, match=f"'fa4' {text}"):
            attend(*(x.to(dtype) for x in half(dim=dim)), tiles, backend="fa4", **arguments)
    assert not fa4_stand_in.calls


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sm_80", "found sm_80.*flash-attn-4 drops"), ("sm_89", "found sm_89.*flash-attn-4 drops"),
        ("sm_120", "found sm_120.*flash-attn-4.*block sparsity"), ("sm_121", "found sm_121.*flash-attn-4"),
        ("gfx942", r"sm_90.*sm_100 \(found gfx942\)"), ("cpu", r"sm_90.*sm_100 \(found cpu\)"),
    ],
)  # fmt: skip
def test_other_cards_are_refused_by_name(monkeypatch, name, text):
    fa4_stand_in.install(monkeypatch, name)
    with pytest.raises(BackendUnavailableError, match=text):
        attend(*half(), LISTS, backend="fa4")


def test_a_missing_package_is_told_and_any_version_is_left_to_the_self_check(monkeypatch):
    monkeypatch.setattr(fa4, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(fa4, "triton_requirement", lambda *given: None)

    def requirement() -> str | None:
        library.missing_package.cache_clear()
        return fa4_requirement(CPU)

    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.0")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert requirement() == "the flash-attn-4 package (found none: pip install --pre flash-attn-4)"
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert "a flash-attn-4 with flash_attn_func that can be imported (found 5.0, and " in str(requirement())
    vars(sys.modules["flash_attn.cute.interface"])["flash_attn_func"] = None
    assert requirement() is None
    library.missing_package.cache_clear()


@pytest.mark.parametrize("decays", [False, True])
def test_a_scale_of_heads_multiplies_logits_not_rounded_queries(arch, decays):
    """Like the same factor in the scale of all logits; queries times it, rounded to bfloat16, are off by .4 %."""
    tiles, (q, k, v) = full(300, 300, 256, 128), (3 * x for x in qkv(2, 1, 1, 300, 300, 64, torch.bfloat16))
    decay = frame_decay(300, frame=37, table=TABLE) if decays else None
    arguments = dict(backend="fa4", return_lse=True, frame_decay=decay)
    out, lse = attend(q, k, v, tiles, scale=0.1, head_scale=torch.tensor([[1.7], [-0.37]]), **arguments)
    for b, factor in enumerate((1.7, -0.37)):
        alone, alone_lse = attend(*(x[b : b + 1] for x in (q, k, v)), tiles, scale=0.1 * factor, **arguments)
        torch.testing.assert_close(lse[b : b + 1], alone_lse, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out[b : b + 1], alone, rtol=2**-7, atol=1e-3)


@NEEDS_PACKAGE
def test_the_stand_in_has_the_real_ones_signature():
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import flash_attn_func

    assert fa4_stand_in.BlockSparseTensorsTorch._fields == BlockSparseTensorsTorch._fields
    expected, ours = (inspect.signature(x).parameters for x in (flash_attn_func, fa4_stand_in.flash_attn_func))
    assert {name: x.default for name, x in ours.items()} == {name: x.default for name, x in expected.items()}


COMPILES = """
import sys, torch, cutlass
from dataclasses import replace
from torch._subclasses.fake_tensor import FakeTensorMode
from dit_accel_kernels import TileLists
from dit_accel_kernels.backends import fa4
from dit_accel_kernels.problem import Problem
from flash_attn.cute.interface import _flash_attn_fwd

arch, dim, block_q, features = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
fa4.architecture = lambda device: arch
fa4.triton_requirement = lambda *given: None


class Card:  # on sm_100 the driver would be asked how many multiprocessors there are
    def get_device_multiprocessor_count(self):
        return 148


cutlass.utils.HardwareInfo = Card
states = torch.zeros(-(-1000 // block_q), 8, dtype=torch.uint8)
states[:, ::3] = 2
tiles = TileLists.from_states(states, block_q=block_q, block_k=128, num_q=1000, num_k=1000)
valid = torch.arange(1000)[None] < torch.tensor([[1000], [700]])
frames = torch.arange(1000, dtype=torch.int32) // 50
parts = dict(exact_offsets=tiles.exact_offsets, exact_indices=tiles.exact_indices, pooled_offsets=None)
problem = Problem(
    q=torch.zeros(2, 4, 1000, dim, dtype=torch.bfloat16), k=torch.zeros(2, 2, 1000, dim, dtype=torch.bfloat16),
    v=torch.zeros(2, 2, 1000, dim, dtype=torch.bfloat16), **parts, pooled_indices=None, block_q=block_q, block_k=128,
    heads_first=True, scale=0.1, head_scale=torch.rand(2, 4) if "scale" in features else None,
    key_valid=valid if "mask" in features else None,
    decay=(torch.rand(5), frames, frames) if "decay" in features else None,
)
blocks = fa4._blocks(problem)._replace(empty=None)  # what is done to them after the call is no compiler's work
read = fa4._decay_tensors(*problem.decay) if problem.decay else ()
with FakeTensorMode(allow_non_fake_inputs=True):
    there = lambda x: None if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
    fa4._blocks_of = lambda problem: fa4.ListedBlocks(*map(there, blocks))
    fa4._decay_tensors = lambda *given: tuple(map(there, read))
    moved = {name: there(getattr(problem, name)) for name in ("q", "k", "v", "key_valid", "head_scale")}
    out, lse = fa4._exact_tiles(replace(problem, **moved), need_lse=True)
assert out.shape == (2, 4, 1000, dim) and lse.shape == (2, 4, 1000), (out.shape, lse.shape)
print("compiled", len(_flash_attn_fwd.compile_cache.cache))
"""


def rare(*values):
    return pytest.param(*values, marks=pytest.mark.rare)


@NEEDS_PACKAGE
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "dim", "block_q", "features"),
    [
        ("sm_90", 128, 128, ""), ("sm_90", 96, 256, "mask decay"), ("sm_90", 128, 128, "scale"),
        ("sm_100", 128, 256, ""), ("sm_100", 128, 128, "scale decay"),  # pairs of tiles, which a mask keeps apart
        rare("sm_90", 128, 128, "decay"), rare("sm_90", 64, 256, "mask scale decay"), rare("sm_90", 64, 128, "mask"),
        rare("sm_100", 128, 256, "scale"), rare("sm_100", 96, 256, "mask decay"), rare("sm_100", 64, 128, "mask"),
    ],
)  # fmt: skip
def test_the_real_calls_compile(tmp_path, arch, dim, block_q, features):
    """Without a card: what a call hands over, through flash-attn-4's own compiler to machine code."""
    places = os.pathsep.join([str(Path(__file__).parents[2] / "kernels"), *sys.path])
    environment = dict(
        FLASH_ATTENTION_ARCH=arch, CUTE_DSL_ARCH=f"{arch}a", FLASH_ATTENTION_NUM_SMS="132", CUTE_DSL_KEEP="cubin",
        CUTE_DSL_DUMP_DIR=str(tmp_path), PYTHONPATH=places,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILES, arch, str(dim), str(block_q), features],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.stdout.endswith("compiled 1\n"), done.stderr[-3000:]
    (code,) = tmp_path.glob(f"*.{arch}a.cubin")
    assert code.read_bytes().startswith(b"\x7fELF")


@NEEDS_PACKAGE
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("features", ["", "pooled", "mask pooled", "heads pooled", "decay", "mask decay pooled"])
def test_agrees_with_the_specification_on_a_card(dim, features):
    if missing := fa4_requirement(torch.device("cuda")):
        pytest.skip(f"needs {missing}")
    tiles = random_lists(4 if "heads" in features else 1, 1000, 1100, 128, 128, pooled="pooled" in features)
    inputs, arguments = qkv(1, 4, 2, 1000, 1100, dim, torch.bfloat16), dict(layout="bhsd")
    if "mask" in features:
        arguments["key_mask"] = torch.rand(1, 1100).cuda() > 0.3
    if "decay" in features:
        with torch.device("cuda"):
            arguments["frame_decay"] = frame_decay(1000, 1100, 37, TABLE)
    check_against_reference(*(x.cuda() for x in inputs), tiles.to("cuda"), backend="fa4", **arguments)
