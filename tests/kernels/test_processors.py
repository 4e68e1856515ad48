"""The loop as other processors have it: a sample of the kernels' tests in a process that pretends to be each."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dit_accel_kernels.backends.torch import compiled
from kernel_cases import attend, qkv, random_lists

ROOT = Path(__file__).parents[2]
TILES = f"g++ -include {ROOT / 'tests' / 'support' / 'emulated_tiles.h'}"
SAMPLE = (
    "test_fused_loop.py::test_chunks_panels_and_rows_of_every_length",
    "test_fused_loop.py::test_threads_share_a_call_and_change_no_bit",
    "test_fused_loop.py::test_what_is_no_number_reaches_the_rows_that_see_it_alone",
    "test_fused_loop.py::test_bfloat16_errs_no_more_than_dense_attention",
    "test_calls.py::test_a_call_and_its_gradients_are_what_the_specification_says",
    "test_nonfinite.py",
)
PROCESSORS = {
    "AMX": {"CXX": TILES},
    "AVX512 and bfloat16": {"CXX": "g++ -DNO_TILES"},
    "AVX512": {"CXX": "g++ -mno-avx512bf16", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "AVX2": {"CXX": "g++ -mno-avx512f", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "no vectors in torch": {"ATEN_CPU_CAPABILITY": "default"},
    "no loop": {compiled.SWITCH: "0"},
    "no compiler": {"PATH": ""},
}
pytestmark = pytest.mark.slow
needs_gcc = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not here")


@needs_gcc
@pytest.mark.parametrize("name", PROCESSORS)
def test_a_sample_passes_as_on(name, tmp_path):
    env = {key: value for key, value in os.environ.items() if key not in ("CXX", compiled.SWITCH)}
    chosen = ("-m", "not slow", "-k", "not triton and not reference", *SAMPLE)
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *chosen],
        cwd=ROOT / "tests" / "kernels",
        env=env | {"XDG_CACHE_HOME": str(tmp_path)} | PROCESSORS[name],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-1000:]


@needs_gcc
def test_tiles_give_what_pairs_do_to_rounding(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    call, results = (*qkv(1, 2, 1, 150, 500, 40, torch.bfloat16), random_lists(2, 150, 500, 13, 101)), []
    for compiler in ("g++ -DNO_TILES", TILES):
        monkeypatch.setenv("CXX", compiler)
        compiled.compiled_loop.cache_clear()
        built = compiled.compiled_loop().library
        if built is None or not built.has_pairs():
            pytest.skip("no products of bfloat16 are here to compare with")
        results.append((built.tile_words(), *attend(*call, return_lse=True, backend="torch")))
    compiled.compiled_loop.cache_clear()
    (_, out, lse), (words, tiled_out, tiled_lse) = results
    assert words == 16
    torch.testing.assert_close(tiled_lse, lse, rtol=0, atol=1e-5)
    torch.testing.assert_close(tiled_out, out, rtol=2**-7, atol=1e-3)  # two neighbours in bfloat16
    assert (tiled_out != out).float().mean() < 0.05
