"""The errors of single attention calls: exact where pooling is exact, split into weight and value where it is not."""

from __future__ import annotations

import json

import pytest
import torch
from dit_accel_eval.attention_error import COLUMNS, call_errors, main
from dit_accel_kernels import EXACT, POOLED, TileLists

SUITE = """
version = 1
name = "small"
num_frames = 5
num_inference_steps = 2
guidance_scale = 4.0
clips = 1

[[arm]]
name = "pooled"
radial = { block_size = 16, near = "half", dense_steps = 1, dense_layers = 4, decay_factor = 0.2, rest = "pooled" }

[[arm]]
name = "skip"
radial = { block_size = 16, dense_steps = 1, dense_layers = 4 }
"""


@pytest.fixture
def tiles():
    states = torch.full((4, 4), POOLED, dtype=torch.uint8).fill_diagonal_(EXACT)
    return TileLists.from_states(states, block_q=16, block_k=16, num_q=64, num_k=64)


def test_pooling_is_exact_on_keys_and_values_that_are_constant_in_a_tile(tiles):
    q, k, v = (torch.randn(1, 64, 2, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    k, v = (x[:, ::16].repeat_interleave(16, 1) for x in (k, v))
    errors = call_errors(q, k, v, tiles, None)
    assert set(errors) == set(COLUMNS)
    assert errors["pooled"] < 1e-12 < errors["skip"]
    assert errors["mass"] == pytest.approx(errors["pooled_mass"])


def test_weight_and_value_are_told_apart(tiles):
    q, k, v = (torch.randn(1, 64, 2, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    equal_values = call_errors(q, 3 * k, v[:, ::16].repeat_interleave(16, 1), tiles, None)
    assert equal_values["pooled_mass"] < equal_values["mass"]
    assert equal_values["pooled_true_weight"] > 0.01  # tiles among themselves still have wrong weights
    one_rest = torch.tensor([[EXACT, POOLED], [POOLED, EXACT]], dtype=torch.uint8)
    two = TileLists.from_states(one_rest, block_q=16, block_k=16, num_q=32, num_k=32)
    errors = call_errors(q[:, :32], 3 * k[:, :32], v[:, :32:16].repeat_interleave(16, 1), two, None)
    assert errors["pooled_true_weight"] < 1e-12 < errors["pooled"]
    equal_keys = call_errors(q[:, :32], k[:, :32:16].repeat_interleave(16, 1), v[:, :32], two, None)
    assert equal_keys["pooled"] < 1e-12


def test_the_command_measures_a_suites_pooled_arms(tmp_path, capsys):
    (tmp_path / "suite.toml").write_text(SUITE)
    out = tmp_path / "results" / "errors.jsonl"
    assert main([str(tmp_path / "suite.toml"), "--clips", "1", "--threads", "1", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["arm"], row["layer"], row["steps"]) for row in rows] == [("pooled", layer, "late") for layer in (4, 5)]
    assert all(0 < row["mass"] < 1 for row in rows)
    printed = capsys.readouterr().out
    assert "| pooled | 5 | late |" in printed
    assert "| pooled | all | all |" in printed
    assert main([str(tmp_path / "suite.toml"), "--table", "--out", str(out)]) == 0
    assert capsys.readouterr().out == printed
    assert main([str(tmp_path / "none.toml")]) == 2
    assert "no suite at" in capsys.readouterr().err
