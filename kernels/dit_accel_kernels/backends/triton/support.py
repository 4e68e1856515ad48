"""Where the triton backend runs: devices, dtypes, head dims; triton is imported only where it interprets bfloat16."""
# pyright: basic

import importlib.metadata
import importlib.util
import os

import torch

from ...errors import BackendUnavailableError
from ...problem import Problem
from .launch import architecture, eight_bit_number

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_DIM = 256


def missing_requirement(
    device: torch.device, dtype: torch.dtype | None = None, dim: int | None = None, precision: str | None = None
) -> str | None:
    """What the triton backend would need here and does not find, or None; dtype and dim None: any it supports."""
    if dtype is not None and dtype not in DTYPES:
        return f"bfloat16, float16 or float32 (found {dtype})"
    if dim is not None and (dim % 8 or dim > MAX_DIM):
        return f"a head dim that is a multiple of 8 up to {MAX_DIM} (found {dim})"
    if importlib.util.find_spec("triton") is None:
        return "the triton package (found none)"
    if device.type == "cpu" and interpreted():
        return _interpreter_problem(dtype, precision)
    if device.type not in ("cuda", "xpu"):
        return f"a CUDA, ROCm or XPU device (found {device.type}; TRITON_INTERPRET=1 interprets it on a CPU)"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"compute capability 8.0 or newer (found {capability[0]}.{capability[1]})"
    if precision is not None and eight_bit_number(architecture(device), precision) is None:
        return f"compute capability 8.9, gfx942 or newer for products of {precision} (found {architecture(device)})"
    return None


def check(problem: Problem) -> None:
    """Raise BackendUnavailableError where this machine or this call is out of the kernel's reach, saying why."""
    q, precision = problem.q, problem.precision
    for dim in (q.shape[-1], problem.v.shape[-1]):
        missing = missing_requirement(q.device, q.dtype, dim, precision)
        if missing and precision is not None:
            raise BackendUnavailableError(f"precision {precision!r} needs backend 'triton' and {missing}: leave it out")
        if missing:
            raise BackendUnavailableError(f"backend 'triton' needs {missing}: use 'torch' or 'auto'")


def _interpreter_problem(dtype: torch.dtype | None, precision: str | None) -> str | None:
    """What is wrong with Triton's interpreter for this dtype and precision, or None."""
    if dtype != torch.bfloat16 and precision != "fp8":
        return None
    from .probe import multiplies

    version = importlib.metadata.version("triton")
    if precision == "fp8" and not multiplies(torch.float8_e4m3fn):
        return f"'int8' in Triton's interpreter (found 'fp8', to which Triton {version} does not round there)"
    if dtype == torch.bfloat16 and not multiplies(dtype):
        bits = f"of which Triton {version} multiplies the bit patterns there; TRITON_INTERPRET=1 is set"
        return f"float16 or float32 in Triton's interpreter (found {dtype}, {bits})"
    return None


def interpreted() -> bool:
    """Whether Triton is set to interpret its kernels on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on")
