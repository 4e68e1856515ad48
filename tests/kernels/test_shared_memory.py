"""Bytes of shared memory that a loop moves are read from its instructions, by hand on one of each kind."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels" / "bench"))

from listing import Instruction, read_sass
from shared import Turn, shared_bytes


@pytest.mark.parametrize(
    ("opcode", "operands", "expected"),
    [
        ("LDSM.16.M88.4", "R116, [R154+0x2000]", 8 * 512),
        ("LDSM.16.MT88.2", "R116, [R154]", 8 * 256),
        ("STSM.16.M88", "[R154], R3", 8 * 128),
        ("LDS.128", "R4, [R2]", 8 * 512),
        ("STS.64", "[R2], R4", 8 * 256),
        ("STS.U8", "[R2], R4", 8 * 128),
        ("LDGSTS.E.BYPASS.128", "[R155], [R4.64], P0", 8 * 512),
        ("HGMMA.64x128x16.F32.BF16", "R24, R184, gdesc[UR16], RZ, !UPT", 2 * 128 * 32),  # each of two warp groups
        ("HGMMA.64x128x16.F32.BF16", "R24, gdesc[UR16], R24", 2 * (64 + 128) * 32),
        ("UTMALDG.4D", "[UR16], [UR6]", 32768),  # once, for the block
        ("LDTM.x64", "R4, tmem[UR32]", 0),  # tensor memory is not shared memory
        ("LDG.E.128", "R4, [R2.64]", 0),
        ("ds_read_b128", "v[0:3], v4", 8 * 1024),
        ("ds_read2st64_b64", "v[0:3], v4", 8 * 1024),
        ("ds_write_b16", "v0, v1", 8 * 128),
        ("ds_bpermute_b32", "v0, v1, v2", 8 * 256),
        ("v_mul_f32_e32", "v0, v1, v2", 0),
    ],
)
def test_bytes_of_an_instruction(opcode, operands, expected):
    assert shared_bytes([Instruction(0, "", opcode, operands)], Turn(warps=8, copy=32768)) == expected


def test_tcgen05_takes_its_shape_from_the_products_of_a_turn():
    """Q K: 4 steps of 128 x 128 x 16 with both factors in shared memory; P V: 8 of 128 x 64 x 16 with P elsewhere."""
    both = Instruction(0, "", "UTCHMMA", "gdesc[UR6], gdesc[UR8], tmem[UR17], tmem[UR38], idesc[UR39], !UPT")
    right = Instruction(0, "", "UTCHMMA", "tmem[UR33], gdesc[UR8], tmem[UR14], tmem[UR44], idesc[UR45], UPT")
    turn = Turn(warps=8, products=2 * 128 * 128 * 64, rows=128)
    assert shared_bytes([both] * 4 + [right] * 8, turn) == 4 * (128 + 128) * 32 + 8 * 64 * 32


def test_a_listing_is_summed():
    text = """
        /*0030*/                   LDSM.16.MT88.4 R116, [R154+0x2000] ;            /* 0x000000a29a747f84 */
        /*0040*/                   HMMA.16816.F32.BF16 R12, R40.reuse, R116, RZ ;  /* 0x000000a29a747f84 */
        /*0070*/                   LDGSTS.E.BYPASS.128 [R155], [R8.64], !P0 ;      /* 0x02000000089b7fae */
"""
    assert shared_bytes(read_sass(text), Turn(warps=4)) == 4 * 1024
