"""Kernels compile for six GPUs without one, and their machine code is read right: hot loop, spills, tensor cores."""

import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import astuple
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "kernels" / "bench"
SAMPLE = 29  # launches that are compiled anew in minutes
sys.path.insert(0, str(BENCH))

import aot  # noqa: E402
import cases  # noqa: E402
import compiled  # noqa: E402
from compiled import Instruction, hot_loop, read_amdgcn, read_resources, read_sass, spilled_words  # noqa: E402
from dit_accel_kernels.backends.triton.launch import Key, family_of, launch_table  # noqa: E402
from promised import NAMES, promised  # noqa: E402
from targets import MEMBERS, TARGETS  # noqa: E402

RECORDS = [json.loads(line) for line in aot.TABLE.read_text().splitlines()]


def run_python(*command: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, since this one may run Triton's interpreter."""
    paths = [ROOT / "kernels", ROOT / "tests" / "support", BENCH]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")])}
    env.pop("TRITON_INTERPRET", None)
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, env=env)


def run_aot(tmp_path: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[tuple[str, str], dict]]:
    """The script, and its records."""
    out = tmp_path / "aot.jsonl"
    done = run_python(str(BENCH / "aot.py"), "--out", str(out), "--jobs", "2", *arguments)
    records = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return done, {(r["launch"], r["target"]): r for r in records}


@pytest.mark.slow
def test_spills_and_shared_memory_are_found(tmp_path):
    """On a toy loop: the small one passes everywhere, the large one doesn't."""
    toys = ("--module", "toy_kernels", "--match")
    done, records = run_aot(tmp_path, *toys, "plain|large", "--target", "sm_80,sm_90,gfx942")
    assert done.returncode == 1, done.stderr
    assert len(records) == 6
    for target in ("sm_80", "sm_90", "gfx942"):
        assert aot.faults(records["toy-plain", target]) == []
        assert records["toy-plain", target]["tensor"] == TARGETS[target].tensor
    for target, fault in (("sm_80", "spills"), ("gfx942", "bytes of shared memory of 65536")):
        assert f"toy-large on {target}: " in done.stdout
        assert any(fault in found for found in aot.faults(records["toy-large", target]))
    done, _ = run_aot(tmp_path, *toys, "nothing")
    assert "no launch matches --match 'nothing': try --match ''" in done.stderr


@pytest.mark.slow
def test_only_what_differs_from_its_record_is_compiled(tmp_path):
    """The second time nothing, after an edit of a record that one; one of another Triton version doesn't count."""
    arguments = ("--module", "toy_kernels", "--match", "toy-(plain|large)", "--target", "sm_90", "--changed")
    done, first = run_aot(tmp_path, *arguments)
    assert "0 of 2 are as" in done.stdout
    done, records = run_aot(tmp_path, *arguments)
    assert "2 of 2 are as" in done.stdout
    assert records == first
    for change in ({"fingerprint": "0"}, {"triton": "0.0"}):
        one, other = first.values()
        (tmp_path / "aot.jsonl").write_text(f"{json.dumps({**one, **change, 'spills': 9})}\n{json.dumps(other)}\n")
        done, records = run_aot(tmp_path, *arguments)
        assert "1 of 2 are as" in done.stdout
        for name in ("spills", "triton", "fingerprint"):
            assert [r[name] for r in records.values()] == [r[name] for r in first.values()]


COMPILES = """
import json
from aot import compile_one
from calls import Setting
from recorded import launches_of

into = {}
launches_of("pooled", Setting(), "sm_90", into, "fa4")
forward = next(x for x in into.values() if x.kernel_name == "fwd")
names = list(forward.signature)
started, bits = (forward.constexprs.get((names.index(name),)) for name in ("STARTED", "pooled_bits_ptr"))
print(forward.name, started, bits, forward.signature["q_ptr"])
for target in ("sm_90", "gfx942"):
    launches_of("plain", Setting(dim=64), target, into := {})
    print(json.dumps([compile_one(launch) for launch in into.values()]))
"""


@pytest.mark.slow
def test_a_forward_compiles_and_what_adds_pooled_tiles_to_flash_attention_is_recorded_from_its_call():
    """Tensor cores in its hot loop and no spill there, for NVIDIA and AMD; slow tests compile for all six."""
    done = run_python("-W", "ignore", "-c", COMPILES)
    started, *compiled_for = done.stdout.splitlines()
    assert started == "fwd-bf16-d128-b128-pooled+started True None *bf16", done.stderr[-2000:]
    for target, line in zip(("sm_90", "gfx942"), compiled_for, strict=True):
        [record] = json.loads(line)
        assert aot.faults(record) == []
        assert (record["launch"], record["target"]) == ("fwd-bf16-d64-b128-plain", target)
        assert TARGETS[target].tensor in record["tensor"]
    assert {r["target"] for r in RECORDS if r["launch"].endswith("pooled+started")} == set(cases.STARTED)


@pytest.mark.slow
def test_plain_kernels_compile_for_every_target(tmp_path):
    """Shared memory within the card's, tensor cores in the hot loop and no spill there, on six targets."""
    match = "^(fwd-bf16-d(64|128)-b128-plain|(dq|dkdv)-bf16-d128-b128-backward)$"
    done, records = run_aot(tmp_path, "--module", "cases", "--match", match)
    for kernel in ("fwd-bf16-d64", "fwd-bf16-d128", "dq", "dkdv"):
        assert {target for launch, target in records if launch.startswith(kernel)} == set(TARGETS)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for (launch, target), record in records.items():
        assert record.get("hot_spills", 0) == 0
        if target != "sm_80" or not launch.startswith("fwd"):  # whose long chunks win all the same
            assert record["spills"] == record["stack"] == 0
        assert 0 < record["shared"] <= record["shared_limit"]
        assert TARGETS[target].tensor in record["tensor"]


@pytest.mark.parametrize("target", TARGETS)
def test_every_row_of_the_launch_table_is_compiled_for_every_target_that_takes_it(target):
    """And nothing by a row that is there no more, or had other sizes: what is compiled follows the table."""
    by_row = [(Key(*r["row"]), r) for r in RECORDS if r["target"] == target and "row" in r]
    assert {row for row, _ in by_row} == promised(target)
    for row, record in by_row:
        assert record["sizes"] == list(astuple(launch_table()[row])), record["launch"]
    for row in promised(target):  # at the sizes that it is for
        size = f"-{NAMES[row.kind]}-d{row.dim}-b{row.tile}-"
        assert any(size in record["launch"] for key, record in by_row if key == row), row


def test_rows_serve_targets_and_cards_of_a_family_have_what_its_rows_are_compiled_for():
    """As much shared memory for a block; sm_86, sm_89, sm_120 and sm_121 have least of NVIDIA's."""
    assert set().union(*map(promised, TARGETS)) == set(launch_table())
    for name, card in MEMBERS.items():
        assert card.shared_block >= TARGETS[family_of(name)].shared_block
    least = {name for name, card in (TARGETS | MEMBERS).items() if card.shared_block == 101376}
    assert least == {"sm_86", "sm_89", "sm_120", "sm_121"}
    assert [family_of(name) for name in ("gfx90a", "gfx942", "gfx950", "gfx1100")] == ["gfx942"] * 4


@pytest.mark.slow
@pytest.mark.parametrize("member", MEMBERS)
def test_a_card_of_a_family_takes_the_shared_memory_that_is_recorded_for_it(tmp_path, member):
    """By the launch that takes most; it may spill a few words more than there, as on sm_87."""
    most = max((r for r in RECORDS if r["target"] == family_of(member) and "row" in r), key=lambda r: r["shared"])
    _, records = run_aot(tmp_path, "--match", f"^{re.escape(most['launch'])}$", "--target", member)
    [record] = records.values()
    assert record["shared"] == most["shared"] <= record["shared_limit"]


@pytest.mark.slow
def test_every_variant_is_as_recorded_or_compiles(tmp_path):
    """All variants on all targets: proven by the committed record where nothing changed since, else compiled now.

    More than a sample would take half an hour: of records that are behind the code or of another Triton, only so many
    are made anew, and a warning says how many are left.
    """
    (tmp_path / "aot.jsonl").write_text(aot.TABLE.read_text())
    done, records = run_aot(tmp_path, "--changed", "--sample", str(SAMPLE))
    assert set(records) == {(r["launch"], r["target"]) for r in RECORDS}
    behind = re.search(rf"of {len(RECORDS)} are as .*, (\d+) to be compiled", done.stdout)
    assert behind, done.stdout[-2000:]
    if int(behind[1]) > SAMPLE:
        warnings.warn(
            f"{int(behind[1]) - SAMPLE} records of the compile table are behind the code or of another Triton: run "
            "kernels/bench/aot.py --changed --out kernels/bench/results/aot.jsonl",
            stacklevel=1,
        )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert not {key: aot.faults(record) for key, record in records.items() if aot.faults(record)}


def test_the_committed_table_has_no_fault_and_faults_are_found():
    """No variant spills in its hot loop, asks for too much shared memory or leaves the tensor cores unused."""
    assert {r["target"] for r in RECORDS} == set(TARGETS)
    assert {r["launch"].split("-")[0] for r in RECORDS} >= {"fwd", "dq", "dkdv", "pool"}
    assert not {(r["launch"], r["target"]): aot.faults(r) for r in RECORDS if aot.faults(r)}
    [known] = aot.table_versions()
    record = dict(launch="fwd-bf16-d128-b128-plain", target="sm_90", triton=known, tensor="wgmma")
    record |= dict(spills=3, hot_spills=3, stack=12, shared=0, shared_limit=1)
    wide = {**record, "launch": "fwd-fp32-d256-b128-plain"}
    assert aot.faults(record) == ["3 spills, 3 in the hot loop, 12 bytes of stack"]
    assert aot.faults({**record, "hot_spills": 2}) == ["3 spills, 2 in the hot loop, 12 bytes of stack"]
    assert aot.faults({**record, "hot_spills": 0}) == []
    assert aot.faults({**record, "hot_spills": 0, "spills": 97}) == ["97 spills, 0 in the hot loop, 12 bytes of stack"]
    assert aot.faults({**wide, "hot_spills": 4}) == []
    assert aot.faults({**wide, "hot_spills": 5}) != []
    assert aot.faults({**record, "triton": "0.0"}) == []
    assert aot.spilled({**record, "triton": "0.0"}) == "3 spills, 3 in the hot loop, 12 bytes of stack"
    cold = {name: x for name, x in record.items() if name != "hot_spills"}
    assert aot.spilled(cold) is None  # a few words, where no product waits for them
    assert aot.spilled({**cold, "spills": 9}) == "9 spills, 0 in the hot loop, 12 bytes of stack"
    assert aot.faults({**cold, "tensor": ""}) == ["hot loop on '', not wgmma"]
    assert aot.faults(dict(error="CompilationError: no")) == ["CompilationError: no"]


def test_samples_are_spread_evenly_and_targets_known_by_name(monkeypatch):
    todo = [("module", str(i), "sm_80") for i in range(10)]
    assert [task[1] for task in aot.spread(todo, 4)] == ["0", "2", "5", "7"]
    assert aot.spread(todo, 10) == aot.spread(todo, 11) == todo
    monkeypatch.setattr(sys, "argv", ["aot.py", "--target", "sm_70"])
    with pytest.raises(SystemExit, match=r"--target takes sm_80, .*gfx942, .*sm_121: found sm_70"):
        aot.arguments()


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
    assert (loop[0].address, loop[-1].address) == (0x30, 0x90)
    assert (spilled_words(code), spilled_words(loop)) == (2, 1)
    assert [x.tensor for x in loop if x.tensor] == ["mma"]
    multiply_adds = hot_loop(read_sass(SASS.replace("HMMA.16816.F32.BF16", "FFMA")))  # of float32
    assert multiply_adds
    assert not any(x.tensor for x in multiply_adds)
    for opcode, family in (("HGMMA.64x64x16.F32.BF16", "wgmma"), ("HMMA.16816.F32", "mma"), ("UTCHMMA", "tcgen05")):
        assert Instruction(0, opcode).tensor == family


def test_of_several_loops_the_one_with_the_fewest_instructions_a_product_is_hot():
    """A loop with a mask beside it, and one without a product."""
    plain, code = ["HMMA.16816.F32", "HMMA.16816.F32", "MUFU.EX2", "BRA"], []
    for names in (["HMMA.16816.F32", "FSEL", "FSEL", "BRA"], plain, ["LDG.E", "BRA"]):
        start = len(code)
        code += [Instruction(start + i, x, target=start if x == "BRA" else None) for i, x in enumerate(names)]
    assert [x.opcode for x in hot_loop(code)] == plain
    assert hot_loop(code[8:]) is None


def test_amd_assembly_and_resources():
    loop = hot_loop(read_amdgcn(AMD))
    assert [x.tensor for x in loop if x.tensor] == ["mfma"]
    assert spilled_words(loop) == 1
    assert compiled.describe({"amdgcn": AMD}, 1024, TARGETS["gfx942"]) == dict(
        registers=140, stack=8, spills=2, hot_spills=1, shared=1024, shared_limit=65536, tensor="mfma"
    )
    text = "Function toy:\n  REG:161 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:400"
    assert read_resources(text, {"registers": "REG", "stack": "STACK"}) == {"registers": 161, "stack": 8}
    with pytest.raises(ValueError, match="REG:<number>"):
        read_resources("nothing", {"registers": "REG"})
