"""Triton's interpreter on the CPU, with products of bfloat16 that mean what they say, and without its slow detours.

Import this before anything that imports triton: it switches the interpreter on. Triton 3.9's interpreter keeps bfloat16
as raw 16-bit integers and multiplies those; here they are widened to float32 first, as tensor cores do. It cuts
float32 off where it makes it float8, whose rounding it gets wrong too; here torch rounds. It works out
which integers overflow and drops the answer; here they raise. It reduces by a function of the kernel's own number by
number, makes a table of dtypes to look one up, and searches the whole language at every call of a device function for
what it has replaced at the launch: none of that here, with the same results.
"""

import functools
import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_create_dot = interpreter.InterpreterBuilder.create_dot
_create_fp_to_fp = interpreter.InterpreterBuilder.create_fp_to_fp
reduce_by_numbers = interpreter.ReduceOps.generic_reduce
_patch_lang = interpreter._patch_lang
_EXACTLY = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
_np_dtype_of_numbers = functools.cache(interpreter._get_np_dtype)


def _widened(handle):
    """A float32 copy of a bfloat16 operand; any other operand as it is."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    values = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(values, tl.float32)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    return _create_dot(self, _widened(a), _widened(b), d, input_precision, max_num_imprecise_acc)


def _fp_to_fp(self, src, dst_type, rounding_mode):
    if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.float8e4nv):
        return _create_fp_to_fp(self, src, dst_type, rounding_mode)
    small = torch.from_numpy(np.array(src.data)).to(torch.float8_e4m3fn)
    return interpreter.TensorHandle(small.view(torch.uint8).numpy(), tl.float8e4nv)


def _reduce(self, input):
    """Reduce slice by slice along the axis, in the order of the interpreter's own loop over numbers."""
    if self.axis is None:
        return reduce_by_numbers(self, input)
    arrays, dtypes = [one.handle.data for one in input], [one.dtype for one in input]

    def slices(at):
        return [self.to_tensor(x.take(at, self.axis), dtype) for x, dtype in zip(arrays, dtypes, strict=True)]

    found, shape = slices(0), list(arrays[0].shape)
    for at in range(1, shape[self.axis]):
        found = self.combine_fn.fn(*found, *slices(at))
        found = found if isinstance(found, tuple) else (found,)
    shape[self.axis : self.axis + 1] = [1] if self.keep_dims else []
    return [self.to_tensor(x.handle.data.reshape(shape), dtype) for x, dtype in zip(found, dtypes, strict=True)]


def _require_no_overflow(lhs, rhs, binary_op):
    """Raise `OverflowError` where integers of less than 64 bits don't hold the sum, difference or product."""
    kind = lhs.type.scalar
    if kind.int_bitwidth < 64:
        exact = _EXACTLY[binary_op.__name__](lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
        if exact.min() < kind.get_int_min_value() or exact.max() > kind.get_int_max_value():
            found = f"{exact.min()} to {exact.max()}"
            raise OverflowError(f"{kind} does not hold a result of {binary_op.__name__}: {found}")


def _np_dtype(dtype):
    """NumPy's dtype of numbers, pointers or blocks of them."""
    one = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
    return np.dtype(np.uint64) if isinstance(one, tl.pointer_type) else _np_dtype_of_numbers(one)


def _patch_lang_once(fn):
    """Replace the functions of the language as ``fn`` sees it, unless a launch or call around this one has done so."""
    seen = [module for module in fn.__globals__.values() if module is tl or module is tl.core]
    done = seen and not any(tl.core.is_builtin(module.load) for module in seen)
    return interpreter._LangPatchScope() if done else _patch_lang(fn)


interpreter.InterpreterBuilder.create_dot = _dot
interpreter.InterpreterBuilder.create_fp_to_fp = _fp_to_fp
interpreter.ReduceOps.generic_reduce = _reduce
interpreter.interpreter_semantic.binary_op_sanitize_overflow_impl = _require_no_overflow  # compilers have another
interpreter._get_np_dtype = _np_dtype
interpreter._patch_lang = _patch_lang_once
