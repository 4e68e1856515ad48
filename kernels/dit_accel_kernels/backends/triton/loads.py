"""How kernels load rows: in two column parts, so that head dims need not be powers of 2."""

# Device code is typed by Triton's compiler:
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_part(
    ptr, rows, live, stride, MASKED: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr
):
    """Columns START..START + WIDTH of some rows; zero beyond DIM and, if MASKED, in rows that are not live."""
    columns = START + tl.arange(0, WIDTH)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if MASKED:
        return tl.load(ptrs, mask=live[:, None] & (columns < DIM)[None, :], other=0.0)
    if START + WIDTH > DIM:
        return tl.load(ptrs, mask=(columns < DIM)[None, :], other=0.0)
    return tl.load(ptrs)


@triton.jit
def _load(ptr, rows, live, stride, MASKED: tl.constexpr, DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Some rows of a [*, DIM] matrix as two column parts; the second is a dummy where D2 = 0."""
    a = _load_part(ptr, rows, live, stride, MASKED, 0, D1, DIM)
    return a, _load_part(ptr, rows, live, stride, MASKED, D1, D2, DIM) if D2 > 0 else 0.0


@triton.jit
def _queries(ptr, rows, live, stride, scale, DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Query rows in two column parts, and |scale|: its sign moves into them, for max(scale * x) = scale * max(x)."""
    q1, q2 = _load(ptr, rows, live, stride, True, DIM, D1, D2)
    sign = tl.where(scale < 0, -1.0, 1.0)
    scale *= sign
    q1 = (q1.to(tl.float32) * sign).to(q1.dtype)
    if D2 > 0:
        q2 = (q2.to(tl.float32) * sign).to(q2.dtype)
    return q1, q2, scale


@triton.jit
def _load_near(ptr, stride, ROWS: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Columns START..START + WIDTH of ROWS rows in sequence, by 32-bit offsets that a loop keeps in registers."""
    columns = START + tl.arange(0, WIDTH)
    ptrs = ptr + (tl.arange(0, ROWS)[:, None] * stride.to(tl.int32) + columns[None, :])
    if START + WIDTH > DIM:
        return tl.load(ptrs, mask=(columns < DIM)[None, :], other=0.0)
    return tl.load(ptrs)
