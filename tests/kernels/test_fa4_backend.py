"""The fa4 backend: its lists and masks by a stand-in of flash-attn-4, what it refuses, and the real one's compiler."""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

import importlib.metadata
import inspect
import os
import subprocess
import sys
from pathlib import Path

import fa4_stand_in
import pytest
import torch
from dit_accel_kernels import (
    BackendUnavailableError,
    FrameDecay,
    Routing,
    Selection,
    TileLists,
    Vote,
    block_sparse_attention,
    fa4_requirement,
    resolve_backend,
)
from dit_accel_kernels import api
from dit_accel_kernels.backends.fa4 import support
from kernel_cases import check_against_reference, qkv, random_lists

CPU = torch.device("cpu")
ORDER = torch.randperm(300, generator=torch.Generator().manual_seed(0))


def frame_decay(num_q: int, num_k: int) -> FrameDecay:
    """Frames of 37 tokens, fewer than a tile has, after 37 tokens outside the video; far ones beyond the table."""
    q_frames, k_frames = (torch.arange(n, dtype=torch.int32) // 37 - 1 for n in (num_q, num_k))
    return FrameDecay(table=torch.tensor([1.0, 0.9, 0.5, 0.2]), q_frames=q_frames, k_frames=k_frames)


def installed() -> bool:
    try:
        importlib.metadata.version(support.PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


NEEDS_PACKAGE = pytest.mark.skipif(not installed(), reason="flash-attn-4 is not installed (the extra fa4)")


@pytest.fixture(params=["sm_90", "sm_100"])
def arch(request, monkeypatch) -> str:
    """Both ways of cutting queries into blocks; torch fills what it leaves uninitialised, so that it isn't 0."""
    fa4_stand_in.install(monkeypatch, request.param)
    torch.use_deterministic_algorithms(True)
    yield request.param
    torch.use_deterministic_algorithms(False)


def test_routing_and_what_it_chose_are_one_call(arch):
    q, k, v = qkv(1, 1, 1, 140, 400, 16, torch.bfloat16)
    tiles, routed = TileLists.full(140, 400, block_q=128, block_k=128), Selection(routing=Routing(beta=0.2))
    given = block_sparse_attention(q, k, v, tiles, layout="bhsd", selection=routed, backend="fa4", return_tiles=True)
    lists = Selection(routed=given[1])
    again = block_sparse_attention(q, k, v, tiles, layout="bhsd", selection=lists, backend="fa4")
    assert torch.equal(given[0], again)


def test_full_blocks_hold_what_no_mask_touches(monkeypatch):
    """Five query tiles of 128; on sm_100 pairs of them: what both list is full, what one lists is partial."""
    states = torch.tensor([[2, 2, 0], [2, 0, 2], [0, 1, 0], [0, 0, 0], [0, 2, 2]], dtype=torch.uint8)
    tiles = TileLists.from_states(states, block_q=128, block_k=128, num_q=530, num_k=300)
    q, k, v = qkv(1, 1, 1, 530, 300, 16, torch.bfloat16)

    def lists(arch: str, **arguments) -> tuple[list, list]:
        fa4_stand_in.install(monkeypatch, arch)
        block_sparse_attention(q, k, v, tiles, layout="bhsd", backend="fa4", **arguments)
        tensors = fa4_stand_in.calls[-1]["tensors"]
        assert tensors.block_size == ((128, 128) if arch == "sm_90" else (256, 128))
        found = zip(tensors[:4:2], tensors[1:4:2], strict=True)
        return tuple(
            [row[:n].tolist() for n, row in zip(counts[0, 0].tolist(), indices[0, 0], strict=True)]
            for counts, indices in found
        )

    assert lists("sm_90") == ([[]] * 5, [[0, 1], [0, 2], [], [], [1, 2]])
    assert fa4_stand_in.calls[-1]["mask_mod"] is None
    valid = torch.ones(1, 300, dtype=torch.bool)
    valid[0, 130] = valid[0, 256:] = False
    assert lists("sm_90", key_mask=valid) == ([[1], [], [], [], [1]], [[0], [0], [], [], []])
    fa4_stand_in.install(monkeypatch, "sm_100")
    tiles = TileLists.from_states(states, block_q=128, block_k=128, num_q=530, num_k=300)
    assert lists("sm_100") == ([[1, 2], [], []], [[0], [], [1, 2]])


def test_blocks_are_remembered_with_their_lists(arch):
    q, k, v = qkv(1, 1, 1, 300, 300, 16, torch.bfloat16)
    tiles, mask = random_lists(1, 300, 300, 128, 128), torch.ones(1, 300, dtype=torch.bool)
    for arguments in ({}, {}, dict(key_mask=mask), dict(key_mask=mask)):
        block_sparse_attention(q, k, v, tiles, layout="bhsd", backend="fa4", **arguments)
    mask[0, :100] = False  # masks may change in place
    block_sparse_attention(q, k, v, tiles, layout="bhsd", backend="fa4", key_mask=mask)
    first, second, third, fourth, fifth = (call["tensors"].full_block_idx for call in fa4_stand_in.calls)
    assert second is first
    assert fourth is third
    assert fifth is not fourth


def test_decay_is_remembered_with_its_frames_and_their_order(arch):
    q, k, v = qkv(1, 1, 1, 300, 300, 16, torch.bfloat16)
    tiles, order = TileLists.full(300, 300, block_q=256, block_k=128), ORDER.clone()
    arguments = dict(layout="bhsd", backend="fa4", frame_decay=frame_decay(300, 300), token_order=order)
    for _ in range(2):
        block_sparse_attention(q, k, v, tiles, **arguments)
    order.copy_(torch.arange(300))
    block_sparse_attention(q, k, v, tiles, **arguments)
    first, second, third = (call["aux_tensors"][-2:] for call in fa4_stand_in.calls)
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert torch.equal(third[0], first[0][:, ORDER.argsort()])
    assert fa4_stand_in.calls[0]["mask_mod"] is None


LISTS = random_lists(1, 300, 300, 128, 128)


@pytest.mark.parametrize(
    ("dtype", "dim", "tiles", "arguments", "text"),
    [
        (torch.bfloat16, 16, LISTS, dict(selection=Selection(vote=Vote())), ".*no votes"),
        (torch.float32, 16, LISTS, {}, r"needs bfloat16 or float16 \(found torch.float32\): use 'triton' or 'auto'"),
        (torch.bfloat16, 20, LISTS, {}, r".*head dim.*8.*128 \(found 20\)"),
        (torch.bfloat16, 136, LISTS, {}, r".*head dim.*8.*128 \(found 136\)"),
        (
            torch.bfloat16, 16, random_lists(1, 300, 300, 64, 64), {},
            r".*tiles.*128 or 256 queries x 128 keys \(found 64 x 64\)",
        ),
    ],
)  # fmt: skip
def test_refuses_what_it_does_not_execute(arch, dtype, dim, tiles, arguments, text):
    q, k, v = qkv(1, 2, 2, 300, 300, dim, dtype)
    with pytest.raises(BackendUnavailableError, match=f"'fa4' {text}"):
        block_sparse_attention(q, k, v, tiles, layout="bhsd", backend="fa4", **arguments)
    assert not fa4_stand_in.calls


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sm_80", r"found sm_80.*flash-attn-4 drops"),
        ("sm_89", r"found sm_89.*flash-attn-4 drops"),
        ("sm_120", r"found sm_120.*flash-attn-4.*block sparsity"),
        ("sm_121", r"found sm_121.*flash-attn-4.*block sparsity"),
        ("gfx942", r"sm_90.*sm_100 \(found gfx942\)"),
        ("cpu", r"sm_90.*sm_100 \(found cpu\)"),
    ],
)
def test_other_cards_are_refused_by_name(monkeypatch, name, text):
    fa4_stand_in.install(monkeypatch, name)
    q, k, v = qkv(1, 2, 2, 300, 300, 16, torch.bfloat16)
    with pytest.raises(BackendUnavailableError, match=text):
        block_sparse_attention(q, k, v, LISTS, layout="bhsd", backend="fa4")


def test_a_missing_package_is_told_with_its_version(monkeypatch):
    monkeypatch.setattr(support, "architecture", lambda device: "sm_90")
    support.package_problem.cache_clear()

    def none(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", none)
    assert fa4_requirement(CPU) == "the flash-attn-4 package (found none: pip install flash-attn-4==4.0.0b36)"
    support.package_problem.cache_clear()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: support.COMPILED)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert "a flash-attn-4 that can be imported (found 4.0.0b36, and " in str(fa4_requirement(CPU))
    support.package_problem.cache_clear()


def test_another_version_is_refused_by_name(monkeypatch):
    """Its betas change what they take: only the one whose calls our tests compile is called."""
    monkeypatch.setattr(support, "architecture", lambda device: "sm_90")
    for version in ("4.0.0b35", "4.0.0b37", "4.0.0", "5.0"):
        support.package_problem.cache_clear()
        monkeypatch.setattr(importlib.metadata, "version", lambda name, version=version: version)
        expected = f"flash-attn-4 4.0.0b36, the one that was compiled with our calls (found {version}: pip install"
        assert str(fa4_requirement(CPU)).startswith(expected)
    support.package_problem.cache_clear()


def test_the_extra_asks_for_the_version_that_was_compiled():
    text = (Path(__file__).parents[2] / "kernels" / "pyproject.toml").read_text()
    first, number = support.COMPILED.split("b")
    assert f'fa4 = ["flash-attn-4>={support.COMPILED},<{first}b{int(number) + 1}; ' in text


def test_auto_leaves_it_alone_while_it_has_run_on_no_card(monkeypatch):
    fa4_stand_in.install(monkeypatch, "sm_90")
    assert fa4_requirement(CPU, torch.bfloat16, 128, (128, 128)) is None
    assert resolve_backend("auto", CPU, torch.bfloat16, 128) == "torch"
    monkeypatch.setattr(api.triton_support, "missing_requirement", lambda *given: None)
    assert resolve_backend("auto", torch.device("cuda"), torch.bfloat16, 128) == "triton"
    q, k, v = qkv(1, 2, 2, 300, 300, 16, torch.bfloat16)
    block_sparse_attention(q, k, v, LISTS, layout="bhsd")
    assert not fa4_stand_in.calls
    block_sparse_attention(q, k, v, LISTS, layout="bhsd", backend="fa4")
    assert len(fa4_stand_in.calls) == 1


@pytest.mark.parametrize("decays", [False, True])
def test_a_scale_of_heads_multiplies_logits_not_rounded_queries(arch, decays):
    """Like the same factor in the scale of all logits; queries times it, rounded to bfloat16, are off by .4 %."""
    tiles = TileLists.full(300, 300, block_q=256, block_k=128)
    q, k, v = (3 * x for x in qkv(2, 1, 1, 300, 300, 64, torch.bfloat16))
    arguments: dict = dict(layout="bhsd", backend="fa4", return_lse=True)
    if decays:
        arguments["frame_decay"] = frame_decay(300, 300)
    out, lse = block_sparse_attention(q, k, v, tiles, scale=0.1, head_scale=torch.tensor([[1.7], [-0.37]]), **arguments)
    for b, factor in enumerate((1.7, -0.37)):
        one = [x[b : b + 1] for x in (q, k, v)]
        expected = block_sparse_attention(*one, tiles, scale=0.1 * factor, **arguments)
        torch.testing.assert_close(lse[b : b + 1], expected[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out[b : b + 1], expected[0], rtol=2**-7, atol=1e-3)


@NEEDS_PACKAGE
def test_the_stand_in_has_the_real_ones_signature():
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import flash_attn_func

    assert fa4_stand_in.BlockSparseTensorsTorch._fields == BlockSparseTensorsTorch._fields
    expected = inspect.signature(flash_attn_func).parameters
    found = inspect.signature(fa4_stand_in.flash_attn_func).parameters
    assert {name: x.default for name, x in found.items()} == {name: x.default for name, x in expected.items()}


COMPILES = """
import sys, torch, cutlass
from dataclasses import replace
from torch._subclasses.fake_tensor import FakeTensorMode
from dit_accel_kernels import TileLists
from dit_accel_kernels.backends.fa4 import attend, support
from dit_accel_kernels.problem import Problem
from flash_attn.cute.interface import _flash_attn_fwd

arch, dim, block_q, features = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
support.architecture = lambda device: arch
support.triton_requirement = lambda *given: None


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
    scale=0.1, head_scale=torch.rand(2, 4) if "scale" in features else None,
    key_valid=valid if "mask" in features else None,
    decay=(torch.rand(5), frames, frames) if "decay" in features else None,
)
blocks = attend._blocks(problem)._replace(empty=None)  # what is done to them after the call is no compiler's work
read = attend._decay_tensors(*problem.decay) if problem.decay else ()
with FakeTensorMode(allow_non_fake_inputs=True):
    there = lambda x: None if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
    attend._blocks_of = lambda problem: attend.ListedBlocks(*map(there, blocks))
    attend._decay_tensors = lambda *given: tuple(map(there, read))
    moved = {name: there(getattr(problem, name)) for name in ("q", "k", "v", "key_valid", "head_scale")}
    out, lse = attend._exact_tiles(replace(problem, **moved), need_lse=True)
assert out.shape == (2, 4, 1000, dim) and lse.shape == (2, 4, 1000), (out.shape, lse.shape)
print("compiled", len(_flash_attn_fwd.compile_cache.cache))
"""


@NEEDS_PACKAGE
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "dim", "block_q", "features"),
    [
        ("sm_90", 128, 128, ""),
        pytest.param("sm_90", 128, 128, "decay", marks=pytest.mark.rare),
        ("sm_90", 96, 256, "mask decay"),
        ("sm_90", 128, 128, "scale"),
        pytest.param("sm_90", 64, 256, "mask scale decay", marks=pytest.mark.rare),
        pytest.param("sm_90", 64, 128, "mask", marks=pytest.mark.rare),
        ("sm_100", 128, 256, ""),
        pytest.param("sm_100", 128, 256, "scale", marks=pytest.mark.rare),
        ("sm_100", 128, 128, "scale decay"),  # pairs of tiles, which a mask keeps apart
        pytest.param("sm_100", 96, 256, "mask decay", marks=pytest.mark.rare),
        pytest.param("sm_100", 64, 128, "mask", marks=pytest.mark.rare),
    ],
)
def test_the_real_calls_compile(tmp_path, arch, dim, block_q, features):
    """Without a card: what a call hands over, through flash-attn-4's own compiler to machine code."""
    places = os.pathsep.join([str(Path(__file__).parents[2] / "kernels"), *sys.path])
    environment = dict(
        FLASH_ATTENTION_ARCH=arch, CUTE_DSL_ARCH=f"{arch}a", FLASH_ATTENTION_NUM_SMS="132", CUTE_DSL_KEEP="cubin",
        CUTE_DSL_DUMP_DIR=str(tmp_path), PYTHONPATH=places,
    )  # fmt: skip
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILES, arch, str(dim), str(block_q), features],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert found.stdout.endswith("compiled 1\n"), found.stderr[-3000:]
    (code,) = tmp_path.glob(f"*.{arch}a.cubin")
    assert code.read_bytes().startswith(b"\x7fELF")


@NEEDS_PACKAGE
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("features", ["", "pooled", "mask pooled", "heads pooled", "decay", "mask decay pooled"])
def test_agrees_with_the_specification_on_a_card(dim, features):
    device = torch.device("cuda")
    missing = fa4_requirement(device)
    if missing:
        pytest.skip(f"needs {missing}")
    groups = 4 if "heads" in features else 1
    tiles = random_lists(groups, 1000, 1100, 128, 128, pooled="pooled" in features).to(device)
    q, k, v = (x.to(device) for x in qkv(1, 4, 2, 1000, 1100, dim, torch.bfloat16))
    arguments = dict(layout="bhsd")
    if "mask" in features:
        arguments |= dict(key_mask=torch.rand(1, 1100, device=device) > 0.3)
    if "decay" in features:
        given = frame_decay(1000, 1100)
        parts = {name: getattr(given, name).to(device) for name in ("table", "q_frames", "k_frames")}
        arguments |= dict(frame_decay=FrameDecay(**parts))
    check_against_reference(q, k, v, tiles, backend="fa4", **arguments)
