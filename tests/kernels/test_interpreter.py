"""What the tests change of Triton's interpreter: integers that overflow are found, bfloat16 means what it says."""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from dit_accel_kernels.backends.triton.support import interpreted
from triton.runtime import interpreter

pytestmark = pytest.mark.skipif(not interpreted(), reason="kernels are compiled here, nothing is interpreted")


@triton.jit
def _arithmetic_kernel(a_ptr, b_ptr, out_ptr, KIND: tl.constexpr):
    a, b = tl.load(a_ptr), tl.load(b_ptr)
    tl.store(out_ptr, a + b if KIND == "add" else a - b if KIND == "sub" else a * b)


@pytest.mark.parametrize(("kind", "a", "b"), [("add", 2**30, 2**30), ("sub", -(2**31), 1), ("mul", 2**16, 2**15)])
def test_an_integer_that_overflows_raises(kind, a, b):
    a, b, out = (torch.tensor([x], dtype=torch.int32) for x in (a, b, 0))
    with pytest.raises(interpreter.InterpreterError, match=rf"int32.*{kind}"):
        _arithmetic_kernel[(1,)](a, b, out, kind)
    _arithmetic_kernel[(1,)](a.long(), b.long(), out.long(), kind)
    _arithmetic_kernel[(1,)](a // 2, b // 2, out, kind)
    assert out == {"add": a // 2 + b // 2, "sub": a // 2 - b // 2, "mul": a // 2 * (b // 2)}[kind]


PLAIN = """
import sys, torch
from dit_accel_kernels import TileLists, backend_of_last_call, block_sparse_attention, triton_requirement

print([name for name in ("triton", "torch._inductor", "diffusers", "transformers") if name in sys.modules])
tiles = TileLists.full(20, 20, block_q=16, block_k=16)
q = torch.ones(1, 20, 1, 16)
block_sparse_attention(*[q.to(torch.bfloat16)] * 3, tiles)
assert backend_of_last_call() in ("torch", "gather")
for dtype in (torch.float16, torch.float32):
    assert triton_requirement(q.device, dtype) is None
    assert torch.equal(block_sparse_attention(*[q.to(dtype)] * 3, tiles, backend="triton"), q.to(dtype))
print([triton_requirement(q.device, torch.float16, 64, precision) for precision in ("int8", "fp8")])
try:
    print(block_sparse_attention(*[q.to(torch.bfloat16)] * 3, tiles, backend="triton").float().abs().max())
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


@pytest.mark.slow
def test_triton_s_own_interpreter_is_right_for_bfloat16_and_fp8_or_refused():
    """Without what the tests change of it: products of bit patterns would be handed on; importing loads no compiler."""
    paths = os.pathsep.join([str(Path(__file__).parents[2] / "kernels"), *sys.path])
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PLAIN], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    loaded, eight_bits, product = done.stdout.splitlines()
    assert loaded == "[]"
    assert eight_bits.startswith("[None, \"'int8' in Triton's interpreter (found 'fp8', to which Triton")
    refused = (
        r"BackendUnavailableError: backend 'triton' needs float16 or float32 in Triton's interpreter \(found "
        r"torch.bfloat16, of which Triton [\d.]+ multiplies the bit patterns there; TRITON_INTERPRET=1 is set\): use "
        r"'torch' or 'auto'"
    )
    assert re.fullmatch(rf"tensor\(1\.\)|{refused}", product), product
