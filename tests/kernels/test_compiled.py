"""Machine code is read right: the hot loop, spilled words, tensor cores, resources."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels" / "bench"))

import compiled
from compiled import Instruction, hot_loop, read_amdgcn, read_resources, read_sass, spilled_words

SASS = """
        Function : toy_fwd_kernel
        /*0000*/                   MOV R1, c[0x0][0x28] ;                          /* 0x00000a0000017a02 */
                                                                                  /* 0x003fde0000000f00 */
        /*0010*/                   LDGSTS.E.BYPASS.128 [R155], [R4.64], P0 ;       /* 0x02000000049b7fae */
        /*0020*/              @!P0 BRA 0x00a0 ;                                   /* 0x00000cd000008947 */
        /*0030*/                   LDSM.16.MT88.4 R116, [R154+0x2000] ;            /* 0x000000a29a747f84 */
        /*0040*/                   HMMA.16816.F32.BF16 R12, R40.reuse, R116, RZ ;  /* 0x000000a29a747f84 */
        /*0050*/                   MUFU.EX2 R12, R12 ;                             /* 0x000000a29a747f84 */
        /*0060*/                   STL [R1], R12 ;                                 /* 0x000000a29a747f84 */
        /*0090*/               @P0 BRA 0x30 ;                                      /* 0xfffff5f000000947 */
        /*00a0*/                   LDL R12, [R1] ;                                 /* 0x000000000000794d */
        /*00a8*/                   EXIT ;                                          /* 0x000000000000794d */
        /*00b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR29], R5 ; /* 0x000000000000794d */
        /*00c0*/              @!P0 BRA 0xb0 ;                                      /* 0xfffff5f000000947 */
        /*00d0*/                   BRA 0x30 ;                                      /* 0xfffff5f000000947 */
"""

AMD = """
kernel:
.LBB0_1:
	v_mov_b32_e32 v1, 0
	s_cbranch_scc1 .LBB0_1
.LBB0_2:                               ; =>This Inner Loop Header: Depth=1
	global_load_dwordx4 v[4:7], v[2:3], off
	v_mfma_f32_32x32x8_bf16 v[0:15], v[60:61], v[94:95], 0
	scratch_store_dword off, v1, s32
	v_exp_f32_e32 v1, v2
	s_cbranch_scc0 .LBB0_2
	s_endpgm
    .private_segment_fixed_size: 8
  - .sgpr_spill_count: 0
    .vgpr_count:     140
    .vgpr_spill_count: 2
"""


def test_the_hot_loop_is_the_innermost_one_with_products_and_no_exit():
    code = read_sass(SASS)
    loop = hot_loop(code)
    assert loop is not None
    assert (loop[0].address, loop[-1].address) == (0x30, 0x90)
    assert (spilled_words(code), spilled_words(loop)) == (2, 1)
    assert [x.tensor for x in loop if x.tensor] == ["mma"]


def test_of_several_loops_the_one_with_the_fewest_instructions_a_product_is_hot():
    """A loop with a mask beside it, and one without a product."""
    masked = ["HMMA.16816.F32", "FSEL", "FSEL", "BRA"]
    plain = ["HMMA.16816.F32", "HMMA.16816.F32", "MUFU.EX2", "BRA"]
    other = ["LDG.E", "BRA"]
    code = []
    for names in (masked, plain, other):
        start = len(code)
        code += [Instruction(start + i, x, target=start if x == "BRA" else None) for i, x in enumerate(names)]
    loop = hot_loop(code)
    assert loop is not None
    assert [x.opcode for x in loop] == plain
    assert hot_loop(code[8:]) is None


def test_kernels_of_float32_are_read_by_their_multiply_adds():
    loop = hot_loop(read_sass(SASS.replace("HMMA.16816.F32.BF16", "FFMA")))
    assert loop is not None
    assert not any(x.tensor for x in loop)


def test_amd_assembly():
    loop = hot_loop(read_amdgcn(AMD))
    assert loop is not None
    assert [x.tensor for x in loop if x.tensor] == ["mfma"]
    assert spilled_words(loop) == 1
    found = compiled.describe({"amdgcn": AMD}, 1024, compiled_target("gfx942"))
    assert found == {
        "registers": 140, "stack": 8, "spills": 2, "hot_spills": 1, "shared": 1024, "shared_limit": 65536,
        "tensor": "mfma",
    }  # fmt: skip


def compiled_target(name: str):
    from targets import TARGETS

    return TARGETS[name]


@pytest.mark.parametrize(
    ("opcode", "family"),
    [("HGMMA.64x64x16.F32.BF16", "wgmma"), ("HMMA.16816.F32", "mma"), ("UTCHMMA", "tcgen05"), ("FFMA", "")],
)
def test_tensor_core_families(opcode, family):
    assert Instruction(0, opcode).tensor == family


def test_resources():
    text = "Function toy:\n  REG:161 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:400"
    assert read_resources(text, {"registers": "REG", "stack": "STACK"}) == {"registers": 161, "stack": 8}
    with pytest.raises(ValueError, match="REG:<number>"):
        read_resources("nothing", {"registers": "REG"})
