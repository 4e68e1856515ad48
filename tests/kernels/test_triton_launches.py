"""Triton's launches: where their sizes come from, what a card must have for them, and what is refused by name."""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

import itertools
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dit_accel_kernels import block_sparse_attention_backward, triton_requirement
from dit_accel_kernels.errors import BackendUnavailableError
from dit_accel_kernels.backends.triton import attend as triton_attend
from dit_accel_kernels.backends.triton import backward as triton_backward
from dit_accel_kernels.backends.triton import launch as launches
from dit_accel_kernels.backends.triton import probe, support
from dit_accel_kernels.backends.triton.launch import Key, Launch, key_of, keys_of_row, launch_of, launch_table
from kernel_cases import attend, frame_decay, full, lists_of, problem_from, qkv, random_lists
from triton.runtime.errors import OutOfResources

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels" / "bench"))

from targets import TARGETS

ROWS = json.loads(launches.TABLE.read_text())
HALF, FLOAT, CPU = torch.bfloat16, torch.float32, torch.device("cpu")


def test_every_row_is_a_launch_with_a_source_and_any_architecture_has_one():
    keys = [(key, row) for row in ROWS for key in keys_of_row(row)]
    assert len({key for key, _ in keys}) == len(keys)
    for key, row in keys:
        arch, kind, dim, tile, kernel, feature = key
        assert arch in ("", *TARGETS)
        assert (kind in ("half", "fp32"), dim in (32, 64, 128, 256), tile in (64, 128)) == (True, True, True)
        assert kernel in ("fwd", "dq", "dkdv", "pooled")
        assert feature in ("", "eight", "decay", "mask")
        launch, source = launch_table()[key], row["source"]
        assert all(n & (n - 1) == 0 and n >= 16 for n in (launch.block_q, launch.block_k, launch.block_s))
        assert launch.num_warps in (4, 8)
        if isinstance(source, dict):
            assert source.keys() == {"card", "date", "kernel", "seconds"}
            assert "interpreted" not in source["card"]
        else:
            assert source.startswith("compiled")
    sizes = itertools.product(("half", "fp32"), (64, 128, 256), (128,), ("fwd", "dq", "dkdv", "pooled"))
    assert {Key("", *size) for size in sizes} <= set(launch_table())


def test_lookup_prefers_the_architecture_then_the_tile():
    assert key_of("sm_80", torch.float16, 80, 48) == Key("sm_80", "half", 128, 64)
    assert key_of("sm_80", torch.float32, 256, 192) == Key("sm_80", "fp32", 256, 128)
    rows = launch_table()
    for arch, dtype, dim, tile, expected in (
        ("sm_80", HALF, 128, 64, Key("sm_80", "half", 128, 64)),
        ("sm_80", HALF, 128, 128, Key("sm_80", "half", 128, 128)),
        ("sm_89", HALF, 128, 128, Key("", "half", 128, 128)),
        ("sm_90", HALF, 128, 64, Key("sm_90", "half", 128, 128)),
        ("sm_999", torch.float32, 96, 16, Key("", "fp32", 128, 128)),
        ("sm_999", torch.float16, 80, 128, Key("", "half", 128, 128)),
    ):
        assert launch_of(arch, dtype, dim, tile) == rows[expected]
    assert launch_of("sm_90", HALF, 128) != launch_of("", HALF, 128)
    assert launch_of("sm_80", torch.float16, 24).block_k == 32
    assert launch_of("sm_90", torch.float16, 24) == launch_of("sm_90", torch.float16, 64)


def test_features_have_rows_of_their_own():
    rows, launch = launch_table(), partial(launch_of, "sm_999", HALF, 128, kernel="dq")
    assert launch() == rows[Key("", "half", 128, 128, "dq")]
    assert launch(features=["mask"]) == rows[Key("", "half", 128, 128, "dq", "mask")]
    assert launch(features=["decay", "mask"]) == rows[Key("", "half", 128, 128, "dq", "decay")]
    assert launch_of("sm_90", HALF, 128, kernel="dq", features=["mask"]).block_q == 128  # any feature's
    decays = launch_of("sm_80", HALF, 128, features=["decay"])
    assert decays == rows[Key("sm_80", "half", 128, 128, "fwd", "decay")]


@pytest.mark.parametrize(
    ("arch", "like"),
    [("sm_86", "sm_89"), ("sm_87", "sm_80"), ("sm_103", "sm_100"), ("sm_121", "sm_120"), ("gfx950", "gfx942")],
)
def test_an_architecture_without_rows_has_those_of_its_family(arch, like):
    for kernel, dim, dtype in itertools.product(("fwd", "dq", "dkdv"), (32, 64, 128), (HALF, torch.float32)):
        assert launch_of(arch, dtype, dim, kernel=kernel) == launch_of(like, dtype, dim, kernel=kernel)
    assert launches.bulk_copies(arch, HALF) == (like == "sm_100")
    assert not launches.bulk_copies(arch, torch.float32)


def test_calls_take_the_launch_rows_of_their_features_and_a_device_its_own_chunks_of_means(monkeypatch):
    asked, real = [], triton_attend.launch_of

    def recorded(*given, **named):
        asked.append((given[3], *named["features"]))
        return real(*given, **named)

    monkeypatch.setattr(triton_attend, "launch_of", recorded)
    leaves, tiles = [x.requires_grad_() for x in qkv(1, 1, 1, 32, 32, 16, torch.float32)], full(32)
    for options, features in (
        ({}, ()), (dict(key_length=torch.tensor([20])), ("mask",)), (dict(frame_decay=frame_decay(32)), ("decay",)),
        (dict(frame_decay=frame_decay(32), key_mask=torch.arange(32)[None] < 20), ("decay", "mask")),
    ):  # fmt: skip
        attend(*leaves, tiles, backend="triton", **options).sum().backward()
        assert asked == [(16, *features[: features[:1] == ("decay",)]), *[(128, *features)] * 3]
        asked.clear()
    launch = Launch(block_q=64, block_k=64, block_s=48, num_warps=4, num_stages=2)
    for arch, dtype, rows in (
        ("sm_80", HALF, 32),
        ("sm_90", HALF, 64),
        ("sm_90", torch.float32, 32),
        ("gfx942", HALF, 64),
    ):
        monkeypatch.setattr(triton_attend, "architecture", lambda device, arch=arch: arch)
        problem = problem_from(tiles, *(x.to(dtype) for x in leaves))
        assert triton_attend.pooled_block(problem, launch) == rows
        assert triton_attend.pooled_block(replace(problem, decay=()), launch) == 48
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(device=lambda device: device.index))
    assert triton_attend.on_device(torch.device("cuda", 3)) == 3


def test_a_card_is_named_by_its_architecture(monkeypatch):
    named, card = launches.architecture.__wrapped__, torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 1))
    properties = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert [named(torch.device("xpu")), named(torch.device("cpu"))] == ["xpu", "cpu"]
    for hip, name in ((None, "sm_121"), ("6.4", "gfx942")):
        monkeypatch.setattr(torch.version, "hip", hip)
        assert named(card) == name


class TooLarge:
    """A kernel of which no launch fits."""

    def __getitem__(self, grid):
        def launch(*given, **options):
            raise OutOfResources(102400, 101376, "shared memory")

        return launch


@pytest.mark.parametrize(
    ("module", "kernel", "row"),
    [
        (triton_attend, "_fwd_kernel", "fwd"), (triton_backward, "_dq_kernel", "dq"),
        (triton_backward, "_pooled_dkdv_kernel", "pooled"), (triton_backward, "_dkdv_kernel", "dkdv"),
    ],
)  # fmt: skip
def test_a_launch_that_does_not_fit_names_its_row(monkeypatch, module, kernel, row):
    monkeypatch.setattr(module, kernel, TooLarge())
    q, k, v = qkv(1, 1, 1, 40, 40, 192, torch.float32)
    run = attend if module is triton_attend else partial(block_sparse_attention_backward, q, layout="bhsd")
    key = f"arch '', kind 'fp32', dim 256, tile 128, kernel '{row}', feature ''"
    with pytest.raises(
        BackendUnavailableError,
        match=rf"'triton' .*102400 of.*launch_table\.json with {key} \(found 101376 on cpu\).*'torch'",
    ):
        run(q, k, v, lists_of([[2, 1, 2], [2, 2, 1], [1, 2, 2]]), key_mask=torch.ones(1, 40).bool(), backend="triton")


def test_dtypes_and_head_dims_are_refused():
    wide = r"'triton'.*bfloat16, float16.*float32 \(found torch.float64\)"
    for dtype, dim, value_dim, text in (
        (torch.float64, 16, 16, wide), (torch.float32, 12, 12, r"'triton'.*8.*256 \(found 12\)"),
        (torch.float32, 264, 264, r"8.*256 \(found 264\)"), (torch.float32, 16, 12, r"8 .*256 \(found 12\)"),
    ):  # fmt: skip
        q, k, v = qkv(1, 1, 1, 20, 20, dim, dtype)
        with pytest.raises(BackendUnavailableError, match=text):
            attend(q, k, v[..., :value_dim], random_lists(1, 20, 20, 16, 16), backend="triton")
    q, k, v = qkv(1, 1, 1, 16, 16, 8, torch.float64)
    with pytest.raises(BackendUnavailableError, match=wide):
        triton_backward.attend_backward(problem_from(full(16), q, k, v), q, q[..., 0].float(), q, None)


def test_what_the_machine_lacks_is_told(monkeypatch):
    call = (*qkv(1, 1, 1, 20, 20, 16, torch.float32), random_lists(1, 20, 20, 16, 16))
    for dtype in (HALF, torch.float8_e4m3fn):  # of which the interpreter may not be right
        monkeypatch.setattr(probe, "multiplies", lambda asked, dtype=dtype: asked != dtype)
        refused = [bool(triton_requirement(CPU, *kind)) for kind in ((HALF, 64), (FLOAT, 64, "fp8"), (FLOAT,))]
        assert refused == [dtype == HALF, dtype != HALF, False]
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(BackendUnavailableError, match=r"'triton'.*CUDA, ROCm.*XPU.*found cpu.*TRITON_INTERPRET=1"):
        attend(*call, backend="triton")
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError, match=r"'triton'.*triton package \(found none\)"):
        attend(*call, backend="triton")


def test_auto_is_triton_where_it_runs(monkeypatch):
    cuda, capability = torch.device("cuda", 0), (9, 0)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for device, *more in ((cuda,), (cuda, HALF, 128), (torch.device("xpu"),)):
        assert triton_requirement(device, *more) is None
    for device, *more in ((cuda, torch.float64, 128), (cuda, HALF, 264), (torch.device("mps"),)):
        assert triton_requirement(device, *more)
    capability = (7, 5)
    assert "compute capability 8.0 or newer (found 7.5)" in triton_requirement(cuda)
    capability = (8, 6)
    monkeypatch.setattr(support, "architecture", lambda device: "sm_86")
    assert triton_requirement(cuda, HALF, 64, "int8") is None
    assert "8.9, gfx942 or newer for products of fp8 (found sm_86)" in triton_requirement(cuda, HALF, 64, "fp8")
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: None)
    assert "triton package" in triton_requirement(torch.device("xpu"))


def test_numbers_of_eight_bits():
    for arch, fp8 in (
        ("sm_80", None), ("sm_86", None), ("sm_89", "fn"), ("sm_90", "fn"), ("sm_100", "fn"), ("sm_120", "fn"),
        ("gfx90a", None), ("gfx942", "fnuz"), ("gfx950", "fn"), ("gfx1100", None), ("gfx1201", "fn"), ("xpu", None),
    ):  # fmt: skip
        assert launches.eight_bit_number(arch, "int8") == torch.int8
        assert launches.eight_bit_number(arch, "fp8") == (fp8 and getattr(torch, f"float8_e4m3{fp8}"))
