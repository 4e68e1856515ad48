"""The loop as other processors have it: a sample of the kernels' tests in a process that pretends to be each."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dit_accel_kernels.backends.torch import compiled

ROOT = Path(__file__).parents[2]
EMULATED = ROOT / "tests" / "support" / "emulated_tiles.h"
SAMPLE = (
    "test_fused_loop.py::test_chunks_panels_and_rows_of_every_length",
    "test_fused_loop.py::test_threads_share_a_call_and_change_no_bit",
    "test_fused_loop.py::test_what_is_no_number_reaches_the_rows_that_see_it_alone",
    "test_fused_loop.py::test_bfloat16_errs_no_more_than_dense_attention",
    "test_nonfinite.py",
    "test_calls.py",
)
PROCESSORS = {
    "AMX": {"CXX": f"g++ -include {EMULATED}"},
    "AVX512 and bfloat16, no AMX": {"CXX": "g++ -DNO_TILES"},
    "AVX512": {"CXX": "g++ -mno-avx512bf16", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "AVX2": {"CXX": "g++ -mno-avx512f", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "no vectors in torch": {"ATEN_CPU_CAPABILITY": "default"},
    "no loop": {compiled.SWITCH: "0"},
    "no compiler": {"PATH": ""},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSORS)
def test_a_sample_passes_as_on(name, tmp_path):
    setting = PROCESSORS[name]
    if "g++" in setting.get("CXX", "") and shutil.which("g++") is None:
        pytest.skip("g++ is not here")
    env = {key: value for key, value in os.environ.items() if key not in ("CXX", compiled.SWITCH)}
    chosen = ("-m", "not slow", "-k", "not triton and not fa4 and not reference", *SAMPLE)
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *chosen)
    ended = subprocess.run(
        command,
        cwd=ROOT / "tests" / "kernels",
        env=env | {"XDG_CACHE_HOME": str(tmp_path)} | setting,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-1000:]
    assert " passed" in ended.stdout
