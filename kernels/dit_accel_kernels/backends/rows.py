"""The memory of a call's tensors: how rows, their last dimension, must lie for kernels."""

from torch import Tensor

PIECE = 16  # bytes that are moved at once


def with_whole_rows(x: Tensor) -> Tensor:
    """The tensor, copied only where the numbers of a row do not lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def moves_in_pieces(x: Tensor) -> bool:
    """Whether rows lie in one piece each and all begin at whole pieces of 16 bytes."""
    *apart, within = x.stride()
    return within == 1 and all(n % PIECE == 0 for n in (x.data_ptr(), *(n * x.element_size() for n in apart)))
