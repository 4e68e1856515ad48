"""Booleans as bits of int32 words: bit j % 32 of word j // 32 is entry j."""

import torch
from torch import Tensor


def word_count(key_tiles: int) -> int:
    """Words of a bitmap row, W."""
    return -(-key_tiles // 32)


def pack_bits(chosen: Tensor) -> Tensor:
    """Bool [..., NK] as bits, int32 [..., W]."""
    chosen = torch.nn.functional.pad(chosen, (0, -chosen.shape[-1] % 32)).to(torch.uint8).unflatten(-1, (-1, 8))
    weight = (1 << torch.arange(8, device=chosen.device)).to(torch.uint8)
    return (chosen * weight).sum(-1, dtype=torch.uint8).view(torch.int32)  # the first byte is the lowest


def unpack_bits(bits: Tensor, key_tiles: int | None) -> Tensor:
    """Bits int32 [..., W] as bool [..., NK], or as all that the words hold; the inverse of `pack_bits`."""
    positions = torch.arange(32, device=bits.device, dtype=torch.int32)
    return ((bits[..., None] >> positions) & 1).flatten(-2)[..., :key_tiles].bool()


def count_bits(bits: Tensor) -> Tensor:
    """How many bits are set, int64 [...] of int32 [..., W]; no device sync."""
    return unpack_bits(bits, None).sum(-1)
