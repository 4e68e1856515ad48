"""Kernels compile for six GPUs without one, as the design demands."""

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
from dit_accel_kernels.backends.triton.launch import Key, family_of, launch_table  # noqa: E402
from promised import NAMES, promised  # noqa: E402
from targets import MEMBERS, TARGETS  # noqa: E402

RECORDS = [json.loads(line) for line in aot.TABLE.read_text().splitlines()]


def run_aot(tmp_path: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    """The script in its own process (this one may run Triton's interpreter), and its records."""
    out = tmp_path / "aot.jsonl"
    paths = [ROOT / "kernels", ROOT / "tests" / "support", BENCH]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(BENCH / "aot.py"), "--out", str(out), *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    records = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return found, records


@pytest.mark.slow
def test_spills_and_shared_memory_are_found(tmp_path):
    """On a toy loop: the small one passes everywhere, the large one doesn't."""
    arguments = ("--module", "toy_kernels", "--match", "plain|large", "--target", "sm_80,sm_90,gfx942", "--jobs", "2")
    found, records = run_aot(tmp_path, *arguments)
    assert found.returncode == 1, found.stderr
    by_name = {(r["launch"], r["target"]): r for r in records}
    assert len(by_name) == 6
    for target in ("sm_80", "sm_90", "gfx942"):
        assert aot.faults(by_name["toy-plain", target]) == []
        assert by_name["toy-plain", target]["tensor"] == TARGETS[target].tensor
    for target in ("sm_80", "gfx942"):
        assert f"toy-large on {target}: " in found.stdout
    assert any("bytes of shared memory of 65536" in fault for fault in aot.faults(by_name["toy-large", "gfx942"]))
    assert any("spills" in fault for fault in aot.faults(by_name["toy-large", "sm_80"]))


@pytest.mark.slow
def test_only_what_differs_from_its_record_is_compiled(tmp_path):
    """The second time nothing, after an edit of a record that one; one of another Triton version doesn't count."""
    arguments = ("--module", "toy_kernels", "--match", "toy-(plain|large)", "--target", "sm_90", "--jobs", "1")
    found, first = run_aot(tmp_path, *arguments, "--changed")
    assert "0 of 2 are as" in found.stdout
    found, records = run_aot(tmp_path, *arguments, "--changed")
    assert "2 of 2 are as" in found.stdout
    assert records == first
    for change in ({"fingerprint": "0"}, {"triton": "0.0"}):
        edited = [{**first[0], **change, "spills": 9}, first[1]]
        (tmp_path / "aot.jsonl").write_text("".join(json.dumps(x) + "\n" for x in edited))
        found, records = run_aot(tmp_path, *arguments, "--changed")
        assert "1 of 2 are as" in found.stdout
        assert [r["spills"] for r in records] == [r["spills"] for r in first]
        assert [(r["triton"], r["fingerprint"]) for r in records] == [(r["triton"], r["fingerprint"]) for r in first]


STARTED = """
from calls import Setting
from recorded import launches_of

into = {}
launches_of("pooled", Setting(), "sm_90", into, "fa4")
forward = next(x for x in into.values() if x.kernel_name == "fwd")
names = list(forward.signature)
started, bits = (forward.constexprs.get((names.index(name),)) for name in ("STARTED", "pooled_bits_ptr"))
print(forward.name, started, bits, forward.signature["q_ptr"])
"""


def test_what_adds_pooled_tiles_to_flash_attention_is_recorded_from_its_call():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(BENCH)])}
    env.pop("TRITON_INTERPRET", None)
    found = subprocess.run([sys.executable, "-c", STARTED], capture_output=True, text=True, check=False, env=env)
    assert found.stdout == "fwd-bf16-d128-b128-pooled+started True None *bf16\n", found.stderr[-2000:]


def test_what_flash_attention_leaves_to_us_is_compiled_where_it_runs():
    assert {r["target"] for r in RECORDS if r["launch"].endswith("pooled+started")} == set(cases.STARTED)


@pytest.mark.parametrize("target", TARGETS)
def test_every_row_of_the_launch_table_is_compiled_for_every_target_that_takes_it(target):
    """And nothing by a row that is there no more, or had other sizes: what is compiled follows the table."""
    found = [(Key(*r["row"]), r) for r in RECORDS if r["target"] == target and "row" in r]
    assert {row for row, _ in found} == promised(target)
    for row, record in found:
        assert record["sizes"] == list(astuple(launch_table()[row])), record["launch"]
    for row in promised(target):  # at the sizes that it is for
        size = f"-{NAMES[row.kind]}-d{row.dim}-b{row.tile}-"
        assert any(size in record["launch"] for key, record in found if key == row), row


def test_every_row_of_the_launch_table_serves_a_target():
    assert set().union(*map(promised, TARGETS)) == set(launch_table())


def test_cards_of_a_family_have_what_its_rows_are_compiled_for():
    """As much shared memory for a block; sm_86, sm_89, sm_120 and sm_121 have least of NVIDIA's."""
    for name, card in MEMBERS.items():
        assert card.shared_block >= TARGETS[family_of(name)].shared_block
    assert {name for name, card in (TARGETS | MEMBERS).items() if card.shared_block == 101376} == {
        "sm_86", "sm_89", "sm_120", "sm_121",
    }  # fmt: skip
    assert [family_of(name) for name in ("gfx90a", "gfx942", "gfx950", "gfx1100")] == ["gfx942"] * 4


@pytest.mark.slow
@pytest.mark.parametrize("member", MEMBERS)
def test_a_card_of_a_family_takes_the_shared_memory_that_is_recorded_for_it(tmp_path, member):
    """By the launch that takes most; it may spill a few words more than there, as on sm_87."""
    rows = [r for r in RECORDS if r["target"] == family_of(member) and "row" in r]
    most = max(rows, key=lambda r: r["shared"])
    match = f"^{re.escape(most['launch'])}$"
    _, [record] = run_aot(tmp_path, "--match", match, "--target", member, "--jobs", "1")
    assert record["shared"] == most["shared"] <= record["shared_limit"]


def test_a_sample_is_spread_evenly():
    todo = [("module", str(i), "sm_80") for i in range(10)]
    assert [task[1] for task in aot.spread(todo, 4)] == ["0", "2", "5", "7"]
    assert aot.spread(todo, 10) == aot.spread(todo, 11) == todo


@pytest.mark.slow
def test_every_variant_is_as_recorded_or_compiles(tmp_path):
    """All variants on all targets: proven by the committed record where nothing changed since, else compiled now.

    More than a sample would take half an hour: of records that are behind the code or of another Triton, only so many
    are made anew, and a warning says how many are left.
    """
    committed = (BENCH / "results" / "aot.jsonl").read_text()
    (tmp_path / "aot.jsonl").write_text(committed)
    found, records = run_aot(tmp_path, "--changed", "--sample", str(SAMPLE), "--jobs", "2")
    expected = {(r["launch"], r["target"]) for r in map(json.loads, committed.splitlines())}
    assert {(r["launch"], r["target"]) for r in records} == expected
    behind = re.search(rf"of {len(expected)} are as .*, (\d+) to be compiled", found.stdout)
    assert behind, found.stdout[-2000:]
    if int(behind[1]) > SAMPLE:
        warnings.warn(
            f"{int(behind[1]) - SAMPLE} records of the compile table are behind the code or of another Triton: run "
            "kernels/bench/aot.py --changed --out kernels/bench/results/aot.jsonl",
            stacklevel=1,
        )
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    for record in records:
        assert aot.faults(record) == [], (record["launch"], record["target"])


def test_the_committed_table_has_no_fault():
    """No variant spills in its hot loop, asks for too much shared memory or leaves the tensor cores unused."""
    assert {r["target"] for r in RECORDS} == set(TARGETS)
    assert {r["launch"].split("-")[0] for r in RECORDS} >= {"fwd", "dq", "dkdv", "pool"}
    for record in RECORDS:
        assert aot.faults(record) == [], (record["launch"], record["target"])


def test_one_variant_compiles_for_every_target(tmp_path):
    """The plain forward, whatever the table says: tensor cores in its hot loop and no spill there."""
    found, records = run_aot(tmp_path, "--module", "cases", "--match", "^fwd-bf16-d64-b128-plain$", "--jobs", "1")
    assert [r["target"] for r in records] == list(dict.fromkeys(r["target"] for r in records))
    assert {r["target"] for r in records} == set(TARGETS)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    assert all(TARGETS[r["target"]].tensor in r["tensor"] for r in records)


def test_spills_count_in_the_hot_loop_and_with_the_table_s_compiler():
    [known] = aot.table_versions()
    record = dict(launch="fwd-bf16-d128-b128-plain", target="sm_90", triton=known, tensor="wgmma")
    record |= dict(spills=3, hot_spills=3, stack=12, shared=0, shared_limit=1)
    assert aot.faults(record) == ["3 spills, 3 in the hot loop, 12 bytes of stack"]
    assert aot.faults({**record, "hot_spills": 2}) == ["3 spills, 2 in the hot loop, 12 bytes of stack"]
    assert aot.faults({**record, "hot_spills": 0}) == []
    assert aot.faults({**record, "hot_spills": 0, "spills": 97}) == ["97 spills, 0 in the hot loop, 12 bytes of stack"]
    assert aot.faults({**record, "launch": "fwd-fp32-d256-b128-plain", "hot_spills": 4}) == []
    assert aot.faults({**record, "launch": "fwd-fp32-d256-b128-plain", "hot_spills": 5}) != []
    assert aot.faults({**record, "triton": "0.0"}) == []
    assert aot.spilled({**record, "triton": "0.0"}) == "3 spills, 3 in the hot loop, 12 bytes of stack"
    cold = {name: x for name, x in record.items() if name != "hot_spills"}
    assert aot.spilled(cold) is None  # a few words, where no product waits for them
    assert aot.spilled({**cold, "spills": 9}) == "9 spills, 0 in the hot loop, 12 bytes of stack"
    assert aot.faults({**cold, "tensor": ""}) == ["hot loop on '', not wgmma"]


@pytest.mark.slow
def test_plain_kernels_compile_for_every_target(tmp_path):
    """Shared memory within the card's, tensor cores in the hot loop and no spill there, on six targets."""
    match = "^(fwd-bf16-d128-b128-plain|(dq|dkdv)-bf16-d128-b128-backward)$"
    found, records = run_aot(tmp_path, "--module", "cases", "--match", match, "--jobs", "2")
    assert {r["target"] for r in records if r["launch"].startswith("fwd")} == set(TARGETS)
    assert {r["target"] for r in records if r["launch"].startswith("dq")} == set(TARGETS)
    assert {r["target"] for r in records if r["launch"].startswith("dkdv")} == set(TARGETS)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    for record in records:
        assert record.get("hot_spills", 0) == 0
        if record["target"] != "sm_80" or not record["launch"].startswith("fwd"):  # whose long chunks win all the same
            assert record["spills"] == record["stack"] == 0
        assert 0 < record["shared"] <= record["shared_limit"]
        assert TARGETS[record["target"]].tensor in record["tensor"]


def test_a_compiler_failure_is_a_finding():
    assert aot.faults(dict(error="CompilationError: no")) == ["CompilationError: no"]


def test_bad_arguments_are_named(tmp_path):
    found, _ = run_aot(tmp_path, "--target", "sm_70")
    assert (
        "--target takes sm_80, sm_89, sm_90, sm_100, sm_120, gfx942, sm_86, sm_87, sm_103, sm_121: found sm_70"
        in found.stderr
    )
    found, _ = run_aot(tmp_path, "--module", "toy_kernels", "--match", "nothing")
    assert "no launch matches --match 'nothing': try --match ''" in found.stderr
