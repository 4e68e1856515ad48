"""Listings of compiled kernels are read right: loops, instruction mixes, what runs in every turn, resources."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels" / "bench"))

import listing

SASS = """
        Function : toy_fwd_kernel
        /*0000*/                   MOV R1, c[0x0][0x28] ;                          /* 0x00000a0000017a02 */
                                                                                  /* 0x003fde0000000f00 */
        /*0010*/                   LDGSTS.E.BYPASS.128 [R155], [R4.64], P0 ;       /* 0x02000000049b7fae */
        /*0020*/              @!P0 BRA 0x00a0 ;                                   /* 0x00000cd000008947 */
        /*0030*/                   LDSM.16.MT88.4 R116, [R154+0x2000] ;            /* 0x000000a29a747f84 */
        /*0040*/                   HMMA.16816.F32.BF16 R12, R40.reuse, R116, RZ ;  /* 0x000000a29a747f84 */
        /*0050*/                   MUFU.EX2 R12, R12 ;                             /* 0x000000a29a747f84 */
        /*0060*/                   F2FP.BF16.PACK_AB R12, R13, R12 ;               /* 0x000000a29a747f84 */
        /*0070*/                   LDGSTS.E.BYPASS.128 [R155], [R8.64], !P0 ;      /* 0x02000000089b7fae */
        /*0080*/                   LDGSTS.E.BYPASS.128 [R155+0x8], [R8.64], {last} ; /* 0x02000000089b7fae */
        /*0090*/               @P0 BRA 0x30 ;                                      /* 0xfffff5f000000947 */
        /*00a0*/                   EXIT ;                                          /* 0x000000000000794d */
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
	s_and_saveexec_b64 s[0:1], vcc
	s_cbranch_execz .LBB0_3
	global_load_dwordx4 v[8:11], v[2:3], off
.LBB0_3:
	v_cndmask_b32_e32 v41, v78, v100, vcc
	v_exp_f32_e32 v1, v2
	s_cbranch_scc0 .LBB0_2
	s_endpgm
    .private_segment_fixed_size: 8
    .sgpr_spill_count: 0
    .vgpr_count:     140
    .vgpr_spill_count: 2
"""

VOTE = """
        /*0000*/                   HMMA.16816.F32.BF16 R12, R40, R116, RZ ;
        /*0010*/               @P1 BRA 0x0030 ;
        /*0020*/                   UTCHMMA R1 ;
        /*0030*/               @P2 BRA 0x0080 ;
        /*0040*/                   SHF.L.W.U32.HI R20, R25, 0x1, R20 ;
        /*0050*/               @P3 BRA 0x0070 ;
        /*0060*/                   STG.E [R24.64], R27 ;
        /*0070*/                   MOV R21, R22 ;
        /*0080*/                   IADD3 R20, R20, 0x1, RZ ;
        /*0090*/               @P0 BRA 0x0000 ;
        /*00a0*/                   EXIT ;
"""

AMD_VOTE = """
kernel:
.LBB0_43:
	s_nop 0
.LBB0_44:
	v_mov_b32_e32 v1, v2
.LBB0_45:
	v_mfma_f32_32x32x8_bf16 v[0:15], v[60:61], v[94:95], 0
	s_cbranch_scc1 .LBB0_45
	v_alignbit_b32 v1, v2, v3, 31
	s_cbranch_scc1 .LBB0_44
	global_store_dword v1, v2, s[0:1]
	s_branch .LBB0_43
	s_endpgm
"""

IR = """
module {
  tt.func public @kernel(%n: i32) attributes {noinline = false} {
    %0 = scf.for %i = %c0 to %n step %c1 iter_args(%a = %cst) -> (tensor<64x64xf32>)  : i32 {
      %p = arith.select %c, %x, %y : i32 loc(#loc1)
      %e = tt.load %entry : !tt.ptr<i32> loc(#loc1)
      %1 = tt.load %ptr : tensor<64x64x!tt.ptr<bf16>> loc(#loc2)
      %2 = tt.dot %q, %1, %cst, inputPrecision = tf32 : tensor<64x64xbf16> * tensor<64x64xbf16> -> tensor<64x64xf32>
      %3 = "tt.reduce"(%2) <{axis = 1 : i32}> ({
      ^bb0(%l: f32, %r: f32):
        %m = arith.maxnumf %l, %r : f32
        tt.reduce.return %m : f32
      }) : (tensor<64x64xf32>) -> tensor<64xf32>
      %4 = scf.if %c -> (tensor<64x64xf32>) {
        %5 = math.exp2 %2 : tensor<64x64xf32>
        scf.yield %5 : tensor<64x64xf32>
      } else {
        scf.yield %2 : tensor<64x64xf32>
      }
      scf.yield %4 : tensor<64x64xf32>
    } loc(#loc3)
    scf.for %j = %c0 to %n step %c1  : i32 {
      %6 = tt.load %ptr, %mask, %cst : tensor<64x64x!tt.ptr<bf16>>
      %7 = tt.dot %q, %6, %cst : tensor<64x64xf32> * tensor<64x64xf32> -> tensor<64x64xf32>
      %8 = arith.select %mask, %7, %cst : tensor<64x64xi1>, tensor<64x64xf32>
    }
    scf.for %j = %c0 to %n step %c1  : i32 {
      %9 = tt.load %ptr : tensor<64x64x!tt.ptr<bf16>>
    }
  }
}
"""


def test_hot_loop_is_the_innermost_one_with_tensor_cores_and_no_exit():
    bodies = listing.loops(listing.read_sass(SASS.format(last="!P0")))
    assert [(body[0].address, body[-1].address) for body in bodies] == [(0x30, 0x90)]
    expected = dict(tensor=1, loads=2, shared=1, selects=0, exp2=1, fp32=0, converts=1, atomics=0, barriers=0)
    assert listing.mix(bodies[0], listing.SASS_RULES) == {**expected, "instructions": 7, "guards": 1}


def test_a_masked_load_shows_as_several_guards():
    bodies = listing.loops(listing.read_sass(SASS.format(last="P3")))
    assert listing.mix(bodies[0], listing.SASS_RULES)["guards"] == 2


def test_what_is_not_for_every_turn_is_told_from_the_rest():
    """A tile's vote behind one branch, a word's store behind two; what a branch without a store skips is for all."""
    code = listing.read_sass(VOTE)
    (body,) = listing.loops(code)
    assert listing.by_depth(body, code) == [6, 3, 1]
    assert listing.every_turn([6, 3, 1], (4, 128)) == 6 + 3 / 4 + 1 / 128
    assert listing.every_turn([6, 3, 1], (32,)) == 6 + 4 / 32
    code = listing.read_sass(VOTE.replace("STG.E", "LDG.E"))
    assert listing.by_depth(listing.loops(code)[0], code) == [10]


def test_what_is_laid_out_after_a_loop_and_leads_back_to_it_is_not_for_every_turn():
    code = listing.read_amdgcn(AMD_VOTE)
    bodies = listing.loops(code)
    assert [len(body) for body in bodies] == [2]
    assert listing.by_depth(bodies[0], code) == [2, 3, 3]
    code = listing.read_amdgcn(AMD_VOTE.replace("global_store_dword", "global_load_dword"))
    assert listing.by_depth(listing.loops(code)[0], code) == [2]


def test_what_is_rare_may_be_told_otherwise():
    """A branch over multiplications counts as rare where those are asked for."""
    code = listing.read_sass(VOTE.replace("SHF.L.W.U32.HI", "FMUL"))
    depths = listing.by_depth(listing.loops(code)[0], code, lambda x: x.opcode == "FMUL")
    assert depths == [6, 4]


def test_operations_of_the_fp32_lanes_are_counted_packed_ones_twice():
    names = ("FADD", "FFMA.FTZ", "FMUL2", "FMNMX", "HMMA.16816.F32", "IADD3")
    body = [listing.Instruction(i, "", name, "") for i, name in enumerate(names)]
    assert listing.mix(body, listing.SASS_RULES)["fp32"] == 4
    names = ("v_mul_f32_e32", "v_exp_f32_e32", "v_mfma_f32_32x32x8_bf16", "s_add_u32", "v_pk_mul_f32")
    body = [listing.Instruction(i, "", name, "") for i, name in enumerate(names)]
    assert listing.mix(body, listing.AMD_RULES)["fp32"] == 2


def test_the_loop_over_pooled_tiles_is_the_last_where_no_loop_was_peeled():
    bodies = listing.loops(listing.read_sass(SASS.format(last="!P0")))
    inner, outer = dict(nested=0), dict(nested=1)
    assert listing.machine_last(bodies, [inner, outer]) == 0
    assert listing.machine_last(bodies, [inner, inner]) == -1


def test_fp32_kernels_are_read_by_their_multiply_adds():
    text = SASS.format(last="!P0").replace("HMMA.16816.F32.BF16", "FFMA")
    bodies = listing.loops(listing.read_sass(text))
    assert len(bodies) == 1
    assert listing.mix(bodies[0], listing.SASS_RULES)["tensor"] == 0


def test_amd_listing():
    bodies = listing.loops(listing.read_amdgcn(AMD))
    assert len(bodies) == 1
    mix = listing.mix(bodies[0], listing.AMD_RULES)
    assert (mix["tensor"], mix["loads"], mix["selects"], mix["exp2"], mix["guards"]) == (1, 2, 1, 1, 1)
    expected = dict(registers=140, spills=2, scalar_spills=0, stack=8)
    assert listing.read_amd_resources(AMD) == expected


@pytest.mark.parametrize(
    ("opcode", "family"),
    [("HGMMA.64x64x16.F32.BF16", "wgmma"), ("HMMA.16816.F32", "mma"), ("UTCHMMA", "tcgen05"), ("FFMA", "")],
)
def test_tensor_core_families(opcode, family):
    assert listing.is_tensor(listing.Instruction(0, "", opcode, "")) == family


def test_ir_counts_operations_on_tensors_in_every_loop_with_dots():
    plain, masked = listing.read_ir(IR)
    assert plain == dict(dots=1, wide_dots=0, loads=1, scalars=1, masked=0, selects=0, exp2=1, converts=0, nested=0)
    assert masked == dict(dots=1, wide_dots=1, loads=1, scalars=0, masked=1, selects=1, exp2=0, converts=0, nested=0)
    assert listing.hot([masked, plain]) is plain


def test_ir_knows_outer_loops():
    wrapped = "scf.for %k = %a to %b step %c : i32 {\n" + IR.replace("module {", "", 1).rstrip()[:-1] + "}\n}"
    found = listing.read_ir(wrapped.replace("tt.func public @kernel(%n: i32) attributes {noinline = false} {", "", 1))
    assert [x["nested"] for x in found] == [0, 0]
    outer = "scf.for %k = %a to %b step %c : i32 {\n%d = tt.dot %e, %f, %g : tensor<8x8xbf16>\n" + wrapped + "\n}"
    found = listing.read_ir(outer)
    assert [bool(x["nested"]) for x in found][:2] == [False, False]
    assert found[-1]["nested"]
    assert not listing.hot(found)["nested"]


def test_resources():
    text = "Function toy:\n  REG:161 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:400"
    assert listing.read_resources(text) == {"registers": 161, "stack": 8}
    with pytest.raises(ValueError, match="prints REG:<number> for a kernel, found 'nothing'"):
        listing.read_resources("nothing")
    with pytest.raises(ValueError, match=r"ends with \.vgpr_count: <number> in its metadata"):
        listing.read_amd_resources("s_endpgm")
