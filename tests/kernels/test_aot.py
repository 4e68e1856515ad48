"""Compiled kernels are read right, and kernel variants compile for six GPUs without one, as the design demands."""

import json
import os
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "kernels" / "bench"
sys.path.insert(0, str(BENCH))

import aot  # noqa: E402
import listing  # noqa: E402
from cards import TARGETS, occupancy  # noqa: E402

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
    expected = dict(tensor=1, loads=2, shared=1, selects=0, exp2=1, converts=1, atomics=0, barriers=0, instructions=7)
    assert listing.mix(bodies[0], listing.SASS_RULES) == {**expected, "guards": 1}


def test_a_masked_load_shows_as_several_guards():
    bodies = listing.loops(listing.read_sass(SASS.format(last="P3")))
    assert listing.mix(bodies[0], listing.SASS_RULES)["guards"] == 2


def test_what_is_not_for_every_turn_is_told_from_the_rest():
    """A tile's vote behind one branch and the store of a word behind two; a branch without a store is for every turn."""
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


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "expected"),
    [
        ("sm_80", 255, 0, 4, (2, "registers")),
        ("sm_80", 32, 40 * 1024, 4, (4, "shared memory")),
        ("sm_90", 168, 100 * 1024, 8, (1, "registers")),
        ("sm_89", 40, 0, 16, (3, "registers")),
        ("sm_89", 32, 0, 16, (3, "threads")),
        ("sm_120", 64, 100 * 1024, 4, (0, "shared memory")),
        ("gfx942", 256, 0, 4, (2, "registers")),
        ("gfx942", 64, 40000, 4, (1, "shared memory")),
    ],
)
def test_occupancy(target, registers, shared, warps, expected):
    assert occupancy(TARGETS[target], registers, shared, warps) == expected


def run_aot(tmp_path: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    """The script in its own process (this one may run Triton's interpreter), and its records."""
    out = tmp_path / "aot.jsonl"
    paths = [ROOT / "kernels", ROOT / "tests" / "support"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(BENCH / "aot.py"), "--out", str(out), *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    records = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return found, records


def test_masks_spills_and_shared_memory_are_found(tmp_path):
    """On a toy loop: the plain one passes everywhere, the masked one and the large one don't."""
    found, records = run_aot(tmp_path, "--module", "toy_kernels", "--target", "sm_80,sm_90,gfx942", "--jobs", "2")
    assert found.returncode == 1, found.stderr
    by_name = {(r["variant"], r["target"]): r for r in records}
    assert len(by_name) == 9
    for target in ("sm_80", "sm_90", "gfx942"):
        assert aot.faults(by_name["toy-plain", target]) + aot.loop_faults(by_name["toy-plain", target]) == []
        assert "1 masked loads" in aot.loop_faults(by_name["toy-masked", target])
        assert f"toy-masked on {target}: 1 masked loads; 1 selects" in found.stdout
    assert "4 predicates on loads for 1 plain loads" in aot.loop_faults(by_name["toy-masked", "sm_80"])
    assert any("bytes of shared memory of 65536" in fault for fault in aot.faults(by_name["toy-large", "gfx942"]))
    assert any("spills" in fault for fault in aot.faults(by_name["toy-large", "sm_80"]))
    assert by_name["toy-plain", "sm_90"]["tensor"] == "wgmma"


def test_some_variants_are_compiled_anew_in_a_file_that_has_all(tmp_path):
    out = tmp_path / "aot.jsonl"
    lines = [
        {"module": "toy_kernels", "variant": "toy-masked", "target": "sm_90", "kept": True},
        {"module": "toy_kernels", "variant": "toy-plain", "target": "sm_80", "spills": 99},
        {"module": "toy_kernels", "variant": "toy-gone", "target": "sm_80"},
    ]
    out.write_text("".join(json.dumps(x) + "\n" for x in lines))
    arguments = ("--module", "toy_kernels", "--match", "toy-plain", "--target", "sm_80", "--jobs", "1", "--merge")
    found, records = run_aot(tmp_path, *arguments)
    assert found.returncode == 0, found.stderr
    by_name = {(r["variant"], r["target"]): r for r in records}
    assert by_name.keys() == {("toy-masked", "sm_90"), ("toy-plain", "sm_80")}
    assert by_name["toy-plain", "sm_80"]["spills"] == 0
    assert by_name["toy-masked", "sm_90"]["kept"]


def test_only_what_differs_from_its_record_is_compiled(tmp_path):
    """The second time nothing, after an edit of the record that one; a record of another Triton version doesn't count."""
    arguments = (
        "--module",
        "toy_kernels",
        "--match",
        "toy-(plain|large)",
        "--target",
        "sm_90",
        "--jobs",
        "1",
        "--changed",
    )
    found, first = run_aot(tmp_path, *arguments)
    assert "0 of 2 are as" in found.stdout
    found, records = run_aot(tmp_path, *arguments)
    assert "2 of 2 are as" in found.stdout
    assert records == first
    for change in ({"fingerprint": "0"}, {"triton": "0.0"}):
        (tmp_path / "aot.jsonl").write_text(
            json.dumps({**first[0], **change, "spills": 9}) + "\n" + json.dumps(first[1])
        )
        found, records = run_aot(tmp_path, *arguments)
        assert "1 of 2 are as" in found.stdout
        assert [r["spills"] for r in records] == [r["spills"] for r in first]
        assert [(r["triton"], r["fingerprint"]) for r in records] == [(r["triton"], r["fingerprint"]) for r in first]


def test_a_recorded_fault_stays_one(tmp_path):
    arguments = ("--module", "toy_kernels", "--match", "toy-masked", "--target", "sm_90", "--jobs", "1", "--changed")
    for count in (0, 1):
        found, _ = run_aot(tmp_path, *arguments)
        assert f"{count} of 1 are as" in found.stdout
        assert "toy-masked on sm_90: 1 masked loads" in found.stdout
        assert found.returncode == 1


def test_comments_and_lines_leave_a_fingerprint_alone(tmp_path, monkeypatch):
    text = (ROOT / "tests" / "support" / "toy_kernels.py").read_text()
    old = "    acc = tl.zeros([BLOCK, BLOCK], tl.float32)\n"
    assert old in text
    (tmp_path / "toy_same.py").write_text(text.replace(old, "    # as wide as a tile\n\n" + old))
    (tmp_path / "toy_other.py").write_text(
        text.replace(old, old.replace("zeros(", "full(").replace(", tl", ", 1.0, tl"))
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    prints = []
    for module in ("toy_kernels", "toy_same", "toy_other"):
        _, records = run_aot(
            tmp_path, "--module", module, "--match", "toy-plain", "--target", "sm_80,gfx942", "--jobs", "1"
        )
        prints.append([r["fingerprint"] for r in records])
    assert prints[0] == prints[1]
    assert not set(prints[0]) & set(prints[2])
    assert len(set(prints[0])) == 2  # one a target


def test_a_sample_is_spread_evenly():
    todo = [("module", str(i), "sm_80") for i in range(10)]
    assert [task[1] for task in aot.spread(todo, 4)] == ["0", "2", "5", "7"]
    assert aot.spread(todo, 10) == aot.spread(todo, 11) == todo


@pytest.mark.slow
def test_every_variant_is_as_recorded_or_compiles(tmp_path):
    """All variants on all targets: proven by the committed record where nothing changed since, else compiled now.

    Another version of Triton than the records' would make all of them anew, for half an hour: it compiles a sample.
    """
    committed = (BENCH / "results" / "aot.jsonl").read_text()
    made_with = {json.loads(line)["triton"] for line in committed.splitlines()}
    if made_with == {version("triton")}:
        (tmp_path / "aot.jsonl").write_text(committed)
        found, records = run_aot(tmp_path, "--changed", "--jobs", "2")
        expected = {task[1:] for task in aot.tasks(aot.modules(), "", list(TARGETS))}
        assert {(r["variant"], r["target"]) for r in records} == expected
        assert f"of {len(expected)} are as" in found.stdout
    else:
        found, records = run_aot(tmp_path, "--sample", "29", "--jobs", "2")
        warnings.warn(
            f"the compile table is of Triton {', '.join(sorted(made_with))}, {version('triton')} is installed: compiled "
            f"{len(records)} variants as a sample of all",
            stacklevel=1,
        )
        assert {r["target"] for r in records} == set(TARGETS)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    assert {r["variant"].split("-")[0] for r in records} >= {"fwd", "bwd", "pool", "route"}
    for record in records:
        assert aot.faults(record) + aot.loop_faults(record) == [], (record["variant"], record["target"])


def test_the_committed_table_has_no_fault():
    """No variant spills, asks for too much shared memory or has in its hot loop what should not be there."""
    records = [json.loads(line) for line in (BENCH / "results" / "aot.jsonl").read_text().splitlines()]
    assert {r["target"] for r in records} == set(TARGETS)
    assert {r["variant"].split("-")[0] for r in records} >= {"fwd", "bwd", "pool"}
    for record in records:
        assert aot.faults(record) + aot.loop_faults(record) == [], (record["variant"], record["target"])
        assert record["spills"] == record["stack"] == 0


@pytest.mark.slow
def test_plain_kernels_compile_for_every_target(tmp_path):
    """Zero spills, shared memory within the card's, tensor cores in the hot loop and no mask there, on six targets."""
    match = "^(fwd-bf16-d128-plain-b128|bwd-(dq|dkdv)-bf16-d128-plain)"
    found, records = run_aot(tmp_path, "--match", match, "--jobs", "2")
    assert {r["target"] for r in records if r["variant"].startswith("fwd")} == set(TARGETS)
    assert {r["target"] for r in records if r["variant"].startswith("bwd-dq")} == set(TARGETS)
    assert {r["target"] for r in records if r["variant"].startswith("bwd-dkdv")} == set(TARGETS)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    for record in records:
        assert record["spills"] == record["stack"] == 0
        assert 0 < record["shared"] <= record["shared_limit"]
        assert record["blocks"] >= 1
        assert TARGETS[record["target"]].tensor in record["tensor"]
        assert record["ir"]["masked"] == record["ir"]["selects"] == 0


@pytest.mark.slow
def test_featured_kernels_compile(tmp_path):
    """One kernel of every feature, where a family of cards differs most; masks may show outside plain loops only."""
    match = (
        "^(fwd-bf16-d128-decay-b128|fwd-bf16-d64-pooled-b128|fwd-fp32-d64-plain-b128|pool-bf16-d128-mask"
        "|bwd-pooled-bf16-d128|bwd-dkdv-bf16-d128-(decay|mask)|bwd-dq-fp32-d128-plain|bwd-delta-bf16-d128-mask)"
    )
    found, records = run_aot(tmp_path, "--match", match, "--target", "sm_80,sm_90", "--jobs", "2")
    assert len({r["variant"].split("-")[0] for r in records}) == 3
    assert len(records) >= 16
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]


@pytest.mark.slow
def test_tiles_of_64_do_not_spill_where_they_did(tmp_path):
    """Ampere and Ada give up registers for a third program on a multiprocessor; their launches leave them no reason."""
    match = "^fwd-bf16-d128-(plain|decay|pooled)-b64"
    found, records = run_aot(tmp_path, "--match", match, "--target", "sm_80,sm_89", "--jobs", "2")
    assert len(records) == 6
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    assert all("-64x" in record["variant"] for record in records)


def test_a_compiler_failure_is_a_finding():
    record = dict(error="CompilationError: no", hot_loop=True)
    assert aot.faults(record) == ["CompilationError: no"]
    assert aot.loop_faults(record) == []


def test_bad_arguments_are_named(tmp_path):
    found, _ = run_aot(tmp_path, "--target", "sm_70")
    assert "--target takes sm_80, sm_89, sm_90, sm_100, sm_120, gfx942: found sm_70" in found.stderr
    found, _ = run_aot(tmp_path, "--module", "toy_kernels", "--match", "nothing")
    assert "no variant matches --match 'nothing': try --match ''" in found.stderr
