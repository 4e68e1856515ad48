"""The launch table says where each row comes from, and tune.py writes it row by row, in a dry run without a card."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dit_accel_kernels.backends.triton import launch as triton_launch
from dit_accel_kernels.backends.triton.launch import Key, Launch, key_of, key_of_row, launch_of, table

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "kernels" / "bench"
sys.path.insert(0, str(BENCH))

import tune  # noqa: E402
from cards import TARGETS  # noqa: E402

ROWS = json.loads(triton_launch.TABLE.read_text())


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(BENCH / "tune.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, key_of_row(row))))
def test_every_row_is_a_launch_with_a_source(row):
    arch, kind, dim, tile, kernel, feature = key_of_row(row)
    assert arch in ("", *TARGETS)
    assert kind in ("half", "fp32")
    assert kernel in ("fwd", "dq", "dkdv", "pooled")
    assert feature in ("", "decay", "mask")
    assert dim in (32, 64, 128, 256)
    assert tile in (64, 128)
    launch = table()[key_of_row(row)]
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
    rows = table()
    assert launch_of("sm_80", torch.bfloat16, 128, 64) == rows[Key("sm_80", "half", 128, 64)]
    assert launch_of("sm_80", torch.bfloat16, 128) == rows[Key("sm_80", "half", 128, 128)]
    assert launch_of("sm_89", torch.bfloat16, 128) == rows[Key("", "half", 128, 128)]
    assert launch_of("sm_90", torch.bfloat16, 128, 64) == rows[Key("sm_90", "half", 128, 128)]
    assert launch_of("sm_999", torch.float32, 96, 16) == rows[Key("", "fp32", 128, 128)]


def test_features_have_rows_of_their_own():
    rows = table()
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
    for kernel, dim, dtype in itertools.product(("fwd", "dq", "dkdv"), (32, 64, 128), tune.DTYPES.values()):
        assert launch_of(arch, dtype, dim, kernel=kernel) == launch_of(like, dtype, dim, kernel=kernel)
    assert triton_launch.bulk_copies(arch, torch.bfloat16) == (like == "sm_100")


def test_grid_is_small_and_holds_what_can_run():
    assert len(tune.GRID) == 36
    for kind, dim, tile, kernel in tune.KEYS:
        for arch in TARGETS:
            key = Key(arch, kind, dim, tile, kernel)
            found = tune.candidates(key, tiny=False)
            assert found[0] == launch_of(arch, tune.DTYPES[kind], dim, tile, kernel)
            assert 5 <= len(found) == len(set(found)) <= 37
            assert all(x.block_q <= tile and x.block_k <= tile for x in found[1:])
            assert all(tune.fits(x, key) for x in found[1:] if kind == "half")
    assert all(x.block_q <= 32 and x.num_stages == 1 for x in tune.candidates(Key("sm_80", "fp32", 64, 128), False)[1:])


def test_what_cannot_fit_is_never_compiled():
    wide = Launch(block_q=128, block_k=128, block_s=16, num_warps=4, num_stages=2)
    assert not tune.fits(wide, Key("sm_80", "half", 128, 128))  # 256 float32 a thread
    assert tune.fits(wide, Key("sm_100", "half", 128, 128))  # accumulators lie in tensor memory
    deep = Launch(block_q=64, block_k=128, block_s=16, num_warps=4, num_stages=4)
    assert not tune.fits(deep, Key("sm_89", "half", 128, 128))  # three buffers of 64 KB
    assert tune.fits(deep, Key("sm_90", "half", 128, 128))


def test_a_trial_leaves_the_table_as_it_was():
    launch = Launch(block_q=16, block_k=16, block_s=16, num_warps=4, num_stages=1)
    before = dict(table())
    for key in (Key("sm_90", "half", 128, 128), Key("sm_80", "half", 64, 128), Key("sm_90", "half", 64, 128, "dq")):
        with tune.trial(key, launch):
            assert launch_of(key.arch, torch.bfloat16, key.dim, kernel=key.kernel) == launch
        assert dict(table()) == before


def test_instructions_are_counted_by_logit():
    record = {"target": "sm_80", "warps": 4, "logits": 64 * 32, "mix": {"instructions": 512}}
    assert tune.instructions([record]) == 512 * 4 * 32 / (64 * 32)


@pytest.mark.slow
def test_dry_run_writes_one_row_and_goes_on_where_it_stopped(tmp_path):
    out, package = tmp_path / "table.json", triton_launch.TABLE.read_bytes()
    command = ("--device", "cpu", "--tiny", "--arch", "sm_80", "--key", "half,64,128,fwd", "--match", "plain")
    found = run(*command, "--jobs", "1", "--out", str(out))
    assert found.returncode == 0, found.stderr
    rows = {key_of_row(row): row for row in json.loads(out.read_text())}
    new = rows.pop(Key("sm_80", "half", 64, 128))
    assert list(rows.values()) == [row for row in ROWS if key_of_row(row) != Key("sm_80", "half", 64, 128)]
    assert new["source"]["card"] == "none: interpreted on a CPU"
    assert new["source"]["seconds"] > 0
    assert new["source"]["kernel"] == tune.fingerprint()
    assert not list(tmp_path.glob("*.new"))
    again = run(*command, "--jobs", "1", "--out", str(out))
    assert "measured before" in again.stdout
    late = run(*command, "--again", "--budget", "0", "--out", str(out))
    assert "left out for time, run it again to go on: half,64,128,fwd" in late.stdout
    assert triton_launch.TABLE.read_bytes() == package


@pytest.mark.slow
def test_without_a_card_the_compilers_choose(tmp_path):
    """A clean row stays; the one that spills is replaced by one that does not, and says that it was compiled."""
    out = tmp_path / "table.json"
    rows = [{**row} for row in ROWS]
    out.write_text(json.dumps(rows))
    command = ("--device", "none", "--tiny", "--arch", "sm_90", "--key", "half,64,128,fwd", "--match", "plain")
    found = run(*command, "--jobs", "1", "--out", str(out))
    assert found.returncode == 0, found.stderr
    assert json.loads(out.read_text()) == rows
    assert "128x128x64 w8 s3" in found.stdout


@pytest.mark.slow
def test_bad_arguments_are_named(tmp_path):
    found = run("--device", "none", "--arch", "sm_70")
    assert "launches are tuned for sm_80, sm_89, sm_90, sm_100, sm_120, gfx942: found 'sm_70'" in found.stderr
    found = run("--device", "none", "--key", "fp8,64,128")
    assert "--key matches kind,dim,tile,kernel of half,128,128,fwd; half,128,64,fwd" in found.stderr
    assert "found 'fp8,64,128'" in found.stderr
    found = run("--device", "cpu", "--tiny")
    assert "--device cpu tests the script and measures nothing: give --tiny and --out of a copy" in found.stderr


@pytest.mark.skipif(os.path.exists("/dev/nvidia0") or os.path.exists("/dev/kfd"), reason="this machine has a GPU")
def test_without_a_card_it_says_so():
    found = run()
    assert "--device cuda needs a CUDA or ROCm GPU, found none: --device none --arch sm_90 chooses" in found.stderr
