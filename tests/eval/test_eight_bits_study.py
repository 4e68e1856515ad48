"""The study of what eight bits cost: how a call is measured, and that the kernels' page says what was found."""

import json
from dataclasses import replace
from pathlib import Path

import eight_bits
import pytest
import torch
from dit_accel_assets import model_names
from dit_accel_eval.runs.loaded import weights_hash
from dit_accel_kernels import EXACT, POOLED, TileLists

from dit_accel.plan.plan import AttentionPlan
from dit_accel.testing.recording import RecordedCall

ROOT = Path(__file__).parents[2]
LINES = [json.loads(line) for line in (ROOT / "eval" / "results" / "eight-bits.jsonl").read_text().splitlines()]


def call(states, **changes) -> RecordedCall:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 40, 16)
    tiles = TileLists.from_states(states, block_q=16, block_k=16, num_q=40, num_k=40)
    made = RecordedCall(plan=AttentionPlan(tiles=tiles), context=None, q=q, k=k, v=v, mask=None, scale=None, out=q)
    return replace(made, **changes)


def test_each_arm_is_as_far_off_as_its_numbers_are_coarse():
    states = torch.full((3, 3), POOLED, dtype=torch.uint8).fill_diagonal_(EXACT)
    found = eight_bits.errors(call(states))
    for lists in ("dense", "sparse"):
        bf16, int8, fp8 = (found[lists, arm] for arm in ("bf16", "int8", "fp8"))
        assert 1e-3 < bf16 < int8 < fp8 < 0.1
    assert found["dense", "bf16, SDPA"] < found["dense", "bf16"]
    assert ("sparse", "bf16, SDPA") not in found
    far = eight_bits.errors(call(states, k=call(states).k + 10))
    assert far["dense", "int8"] < 0.3 * far["dense", "int8, keys as they are"]


def test_the_committed_lines_are_of_the_embedded_models():
    assert {line["model"] for line in LINES} == {"wan-tiny", "flux-tiny"} <= set(model_names())
    for line in LINES:
        assert line["weights"] == weights_hash(line["model"])
        assert line["calls"] >= 30
        assert line["tile"] == eight_bits.TILES[line["lists"]]
    assert "| wan-tiny | sparse | int8 |" in eight_bits.table(LINES)


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ("int8", "off by {} and {} %"),
        ("fp8", "with fp8 by {} and {} %"),
        ("int8, keys as they are", "without the subtracted mean of the keys int8 by {} and {} %"),
    ],
)
def test_the_page_says_what_was_found(arm, words):
    page = (ROOT / "kernels" / "README.md").read_text()
    mean = {
        line["model"]: f"{100 * line['mean']:.1f}" for line in LINES if (line["lists"], line["arm"]) == ("dense", arm)
    }
    assert words.format(mean["wan-tiny"], mean["flux-tiny"]) in page
    sdpa = {f"{100 * line['mean']:.1f}" for line in LINES if line["arm"] == "bf16, SDPA"}
    assert sdpa == {"0.2"}
    assert "those of SDPA in bf16 by 0.2 %" in page
