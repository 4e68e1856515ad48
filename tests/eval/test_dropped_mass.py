"""What a budget's calls leave out: the measure, a run of it, and that every recorded call is within its budget."""

import json

import dropped_mass
import torch
from dit_accel_eval.runs.results import read_lines
from dit_accel_kernels import Selection, TileLists, pack_bits
from study import RESULTS

from dit_accel.attachment.layers import PlannedCall
from dit_accel.plan.call import Call
from dit_accel.plan.context import CallContext
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.plan import AttentionPlan


def test_the_mass_is_that_of_the_dropped_tiles_in_their_order():
    q, k, v = torch.randn(3, 1, 2, 40, 8, dtype=torch.float64)
    tiles = TileLists.full(40, 40, block_q=16, block_k=16)
    kept, order = torch.rand(1, 2, 3, 3) < 0.6, torch.randperm(40)
    plan = AttentionPlan(tiles=tiles, token_order=order, selection=Selection(keep=pack_bits(kept)))
    context = CallContext(
        transformer="transformer", branch="cond", step_index=0, num_inference_steps=4, sigma=None, batch=1, layer=0,
        depth=0, layout=TokenLayout(frames=1, height=1, width=40), device=q.device,
    )  # fmt: skip
    call = Call(q=q, k=k, v=v, scale=0.5)
    planned = PlannedCall(plan=plan, context=context, call=call, out=v, exact=pack_bits(kept))
    found = dropped_mass.dropped_mass(planned)
    p = (q @ k.mT * 0.5).softmax(-1)
    for head in range(2):
        for place, row in enumerate(order.tolist()):
            lost = [key for at, key in enumerate(order.tolist()) if not kept[0, head, place // 16, at // 16]]
            torch.testing.assert_close(found[0, head, place], p[0, head, row, lost].sum())


def test_a_run_is_recorded_once_and_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    out = tmp_path / "mass.jsonl"
    arguments = ["--num-frames", "5", "--steps", "5", "--clips", "1", "--threads", "1", "--out", str(out)]
    assert dropped_mass.main([*arguments, "--budgets", "0.9"]) == 0
    (line,) = read_lines(out)
    assert line["calls"] == line["calls_within"] > 0
    assert 0 < line["mean"] <= line["largest_mean"] <= line["largest_row"]
    assert "| 0.9 |" in capsys.readouterr().out
    monkeypatch.setattr(dropped_mass, "_measured", lambda pipe, options, budget, clip: {**line, "budget": budget})
    assert dropped_mass.main([*arguments, "--budgets", "0.9", "0.5"]) == 0
    assert [json.loads(row)["budget"] for row in out.read_text().splitlines()] == [0.9, 0.5]
    assert dropped_mass.main(["--table", "--out", str(out)]) == 0


def test_the_mean_mass_of_every_recorded_call_is_within_its_budget():
    lines = read_lines(RESULTS / "dropped-mass.jsonl")
    assert len({line["clip"] for line in lines if line["budget"] == 0.1}) >= 16
    assert all(line["calls_within"] == line["calls"] and line["largest_mean"] <= line["budget"] for line in lines)
    assert all(line["sparse_density"] < 1 for line in lines)
