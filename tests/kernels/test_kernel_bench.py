"""The kernel bench runs, prints its table and appends records that hold what the tables need."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "kernels" / "bench" / "block_sparse.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH), "--threads", "1", "--rounds", "1", "--block", "64", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_bench_prints_a_table_and_appends_json_lines(tmp_path):
    out = tmp_path / "results.jsonl"
    only = "torch,gather-sdpa,gather-bmm,tile-bmm"
    found = run("--shape", "1,2,256,16", "--density", "0.5", "--dtype", "fp32", "--only", only, "--out", str(out))
    assert found.returncode == 0, found.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["candidate"] for r in records] == ["dense", *only.split(",")]
    for record in records:
        assert record["candidate"] in found.stdout
        assert record["relative_error"] < 1e-5
        assert record["seconds_p20"] <= record["seconds"] <= record["seconds_p80"]
        assert record["density"] == (1.0 if record["candidate"] == "dense" else 0.5)
        assert abs(record["of_ideal"] - record["speedup"] * record["density"]) < 1e-9
        assert {"device", "processor", "torch", "threads", "shape", "dtype", "block", "lists", "tflops"} <= set(record)


def test_bench_refuses_ragged_shapes():
    found = run("--shape", "1,2,100,16")
    assert found.returncode == 1
    assert "--shape needs whole tiles: found 100 tokens for --block 64" in found.stderr
