"""The launch table says where each row comes from, and every call finds its row."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from dit_accel_kernels.backends.triton import launch as triton_launch
from dit_accel_kernels.backends.triton.launch import Key, key_of, key_of_row, launch_of, launch_table

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels" / "bench"))

from targets import TARGETS

ROWS = json.loads(triton_launch.TABLE.read_text())


def test_every_row_is_a_launch_with_a_source():
    for row in ROWS:
        check_row(row)


def check_row(row: dict) -> None:
    arch, kind, dim, tile, kernel, feature = key_of_row(row)
    assert arch in ("", *TARGETS)
    assert kind in ("half", "fp32")
    assert kernel in ("fwd", "dq", "dkdv", "pooled")
    assert feature in ("", "eight", "decay", "mask")
    assert dim in (32, 64, 128, 256)
    assert tile in (64, 128)
    launch = launch_table()[key_of_row(row)]
    assert all(n & (n - 1) == 0 and n >= 16 for n in (launch.block_q, launch.block_k, launch.block_s))
    assert launch.num_warps in (4, 8)
    source = row["source"]
    if isinstance(source, dict):
        assert source.keys() == {"card", "date", "kernel", "seconds"}
        assert "interpreted" not in source["card"]
    else:
        assert source.startswith("compiled")


def test_rows_are_unique_and_any_architecture_has_a_fallback():
    keys = [key_of_row(row) for row in ROWS]
    assert len(set(keys)) == len(keys)
    sizes = itertools.product(("half", "fp32"), (64, 128, 256), (128,), ("fwd", "dq", "dkdv", "pooled"))
    assert {Key("", *size) for size in sizes} <= set(keys)


def test_lookup_prefers_the_architecture_then_the_tile():
    assert key_of("sm_80", torch.float16, 80, 48) == Key("sm_80", "half", 128, 64)
    assert key_of("sm_80", torch.float32, 256, 192) == Key("sm_80", "fp32", 256, 128)
    rows = launch_table()
    assert launch_of("sm_80", torch.bfloat16, 128, 64) == rows[Key("sm_80", "half", 128, 64)]
    assert launch_of("sm_80", torch.bfloat16, 128) == rows[Key("sm_80", "half", 128, 128)]
    assert launch_of("sm_89", torch.bfloat16, 128) == rows[Key("", "half", 128, 128)]
    assert launch_of("sm_90", torch.bfloat16, 128, 64) == rows[Key("sm_90", "half", 128, 128)]
    assert launch_of("sm_999", torch.float32, 96, 16) == rows[Key("", "fp32", 128, 128)]


def test_features_have_rows_of_their_own():
    rows = launch_table()
    launch = lambda *args, **more: launch_of("sm_999", torch.bfloat16, 128, kernel="dq", **more)  # noqa: E731
    assert launch() == rows[Key("", "half", 128, 128, "dq")]
    assert launch(features=["mask"]) == rows[Key("", "half", 128, 128, "dq", "mask")]
    assert launch(features=["decay", "mask"]) == rows[Key("", "half", 128, 128, "dq", "decay")]
    assert launch_of("sm_90", torch.bfloat16, 128, kernel="dq", features=["mask"]).block_q == 128  # any feature's
    assert (
        launch_of("sm_80", torch.bfloat16, 128, features=["decay"])
        == rows[Key("sm_80", "half", 128, 128, "fwd", "decay")]
    )


@pytest.mark.parametrize(
    ("arch", "like"),
    [("sm_86", "sm_89"), ("sm_87", "sm_80"), ("sm_103", "sm_100"), ("sm_121", "sm_120"), ("gfx950", "gfx942")],
)
def test_an_architecture_without_rows_has_those_of_its_family(arch, like):
    for kernel, dim, dtype in itertools.product(("fwd", "dq", "dkdv"), (32, 64, 128), (torch.bfloat16, torch.float32)):
        assert launch_of(arch, dtype, dim, kernel=kernel) == launch_of(like, dtype, dim, kernel=kernel)
    assert triton_launch.bulk_copies(arch, torch.bfloat16) == (like == "sm_100")
