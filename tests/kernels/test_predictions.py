"""Predictions are printed beside measurements, and their page holds what the committed tables give."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "kernels" / "bench"
PAGE = ROOT / "docs" / "kernel-predictions.md"
sys.path.insert(0, str(BENCH))

import predictions  # noqa: E402
import tried  # noqa: E402
from mixes import read_table  # noqa: E402


def test_table_and_records(tmp_path):
    out, gpu = tmp_path / "roofline.jsonl", tmp_path / "gpu.jsonl"
    command = [sys.executable, str(BENCH / "predictions.py"), "--shape", "wan-720p", "--card", "H100,B200"]
    command += ["--density", "0.27,1", "--out", str(out)]
    lines = [
        dict(kind="check", device="NVIDIA H100"),
        dict(device="NVIDIA H100", shape="wan-720p", candidate="triton", density=0.27, seconds=0.123),
        dict(device="NVIDIA H100", shape="wan-720p", candidate="triton-votes", density=0.27, seconds=0.456),
    ]
    gpu.write_text("".join(json.dumps(x) + "\n" for x in lines))
    for candidate, expected in (("triton", 0.123), ("triton-votes", 0.456), ("triton-backward", None)):
        arguments = ["--measured", str(gpu), "--candidate", candidate]
        found = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
        records = [json.loads(line) for line in out.read_text().splitlines()]
        calls = [(r["card"], r["density"]) for r in records]
        assert calls == [("H100", 0.27), ("H100", 1.0), ("B200", 0.27), ("B200", 1.0)]
        assert [r["measured"] for r in records] == [expected, None, None, None]
        assert {r["candidate"] for r in records} == {candidate}
        row = next(line for line in found.stdout.splitlines() if "wan-720p H100 0.27" in line)
        assert row.endswith("|  |" if expected is None else f"| {expected * 1e3:.2f} |")
        assert f"| {records[0]['limit']} |" in row


def test_unknown_names_are_refused():
    command = [sys.executable, str(BENCH / "predictions.py"), "--shape", "wan"]
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "--shape takes wan-480p, wan-720p" in failed.stderr
    assert failed.returncode == 1


def test_the_page_holds_what_the_committed_tables_give():
    text = PAGE.read_text()
    assert predictions.page(text, read_table()) == text
    for name in ("A100", "H100", "B200", "RTX 4090"):
        assert text.count(f"| Wan 720p at .27, {name} |") == text.count(f"| 128k at .10, {name} |") == 4


def test_a_page_without_marks_is_refused():
    with pytest.raises(ValueError, match="needs one pair of marks <!-- instructions -->"):
        predictions.page("# nothing", read_table())


def test_variants_still_fit_the_kernel_they_edit(tmp_path):
    """The edits are made; where the text is no longer the kernel's that is told."""
    for name in ("lazy", "specialised"):
        variant = tried.VARIANTS[name]
        assert variant.edit is not None
        tried.lay_out(variant, tmp_path / name)
        text = (tmp_path / name / "kernels" / tried.FORWARD).read_text()
        assert variant.edit[1] in text
    gone = tried.Variant(targets=("sm_80",), edit=("not in the kernel", ""))
    with pytest.raises(ValueError, match="must hold the edited text once, found it 0 times: 'not in the kernel'"):
        tried.lay_out(gone, tmp_path / "gone")


LAZY = """
import triton_interpreter, torch
from dit_accel_kernels import TileLists, block_sparse_attention
from kernel_cases import check_against_reference, qkv, random_lists
import dit_accel_kernels.backends.triton.forward as forward

assert "tl.max(top - m, 0) > 8.0" in open(forward.__file__).read()
q, k, v = qkv(1, 1, 1, 40, 80, 16, torch.float32)
tiles = random_lists(1, 40, 80, 16, 16)
for scale in (1.0, 30.0):  # rows whose maximum hardly grows, and rows where it grows by more than 8 at a tile
    check_against_reference(q * scale, k, v, tiles, backend="triton", layout="bhsd", logits=scale)
"""


@pytest.mark.slow
def test_the_lazy_rescale_is_right(tmp_path):
    """What was counted computes attention: in the interpreter, against the specification."""
    tried.lay_out(tried.VARIANTS["lazy"], tmp_path)
    paths = (tmp_path / "kernels", ROOT / "tests" / "support", BENCH)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    found = subprocess.run([sys.executable, "-c", LAZY], env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-2000:]


def test_what_was_tried_is_recorded_for_the_targets_it_is_about():
    for name, variant in tried.VARIANTS.items():
        found = predictions.read_tried(name)
        assert {target for _, target in found} == set(variant.targets)
        assert len(found) == len(variant.targets) * len(variant.tiles)
