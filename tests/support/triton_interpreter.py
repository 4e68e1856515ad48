"""Triton's interpreter on the CPU, with products of bfloat16 that mean what they say.

Import this before anything that imports triton: it switches the interpreter on. Triton 3.9's interpreter keeps bfloat16
as raw 16-bit integers and multiplies those; here they are widened to float32 first, as tensor cores do.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_create_dot = interpreter.InterpreterBuilder.create_dot


def _widened(handle):
    """A float32 copy of a bfloat16 operand; any other operand as it is."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    values = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(values, tl.float32)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    return _create_dot(self, _widened(a), _widened(b), d, input_precision, max_num_imprecise_acc)


interpreter.InterpreterBuilder.create_dot = _dot
