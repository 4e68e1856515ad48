"""How far a planned call is from dense attention, and from the best choice of as many tiles."""

import contextlib
import dataclasses
import json

import call_error
import pytest
import torch
from dit_accel_eval.runs.loaded import EmbeddedModel
from dit_accel_kernels import EXACT, POOLED, SKIPPED, TileLists

import dit_accel
from dit_accel.attachment.layers import PlannedCall
from dit_accel.plan.call import Call
from dit_accel.plan.plan import AttentionPlan
from dit_accel.testing.reference import attention

SMALL = {"height": 32, "width": 32, "num_frames": 5}
ALL = torch.full((2, 3, 3), EXACT, dtype=torch.uint8)


def planned(states, tokens=40, order=None):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, tokens, 8)
    tiles = TileLists.from_states(states, block_q=16, block_k=16, num_q=tokens, num_k=tokens)
    plan = AttentionPlan(tiles=tiles, token_order=order)
    out = attention(plan, tiles.states().expand(1, 2, -1, -1), 2 * q, k, v, None, None)
    return PlannedCall(plan=plan, context=None, call=Call(q=2 * q, k=k, v=v), out=out)


def test_a_call_of_all_tiles_loses_nothing():
    ((density, error, lost, best, pooled, best_lost),) = call_error.figures(
        planned(torch.full((2, 3, 3), EXACT, dtype=torch.uint8))
    )
    assert density == 1
    assert max(error, lost, best, pooled, best_lost) < 1e-5


@pytest.mark.parametrize("order", [None, torch.randperm(40, generator=torch.Generator().manual_seed(1))])
def test_the_best_choice_of_as_many_tiles_loses_least(order):
    states = torch.full((2, 3, 3), SKIPPED, dtype=torch.uint8)
    states[:, range(3), [2, 0, 1]] = EXACT
    call = planned(states, order=order)
    ((density, error, lost, best, _, best_lost),) = call_error.figures(call)
    assert density == pytest.approx(1 / 3)
    q, k = (x if order is None else x[:, :, order] for x in (call.call.q, call.call.k))
    weights = (q @ k.mT / 8**0.5).softmax(-1)
    kept = sum(weights[:, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16].sum() for row, column in
               enumerate((2, 0, 1)))  # fmt: skip
    assert lost == pytest.approx(1 - float(kept) / 80, abs=1e-5)
    assert 0 < best_lost <= lost
    assert 0 < best <= error * 1.2  # the largest mass is not always the least error


@pytest.mark.parametrize("rest", [SKIPPED, POOLED])
def test_a_choice_of_tiles_is_what_its_plan_means(rest):
    torch.manual_seed(0)
    call = planned(torch.where(torch.rand(2, 3, 3) < 0.5, EXACT, rest).to(torch.uint8))
    q, k, v, tiles = call.call.q, call.call.k, call.call.v, call.plan.tiles
    choice = call_error.Choice.of(q, k, v, tiles, None)
    made = choice.made_of(tiles.states()[None] == EXACT, rest == POOLED)
    assert torch.allclose(made, call.out, atol=1e-5)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.allclose(choice.right, dense, atol=1e-5)


def test_shares_are_told_of_the_best_choice_alone():
    told = call_error.figures(planned(ALL), (0.3, 0.7, 1.0))
    assert [line[0] for line in told] == pytest.approx([1 / 3, 2 / 3, 1])
    errors = [line[3] for line in told]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5 < errors[0]


@pytest.mark.slow
def test_each_method_sees_the_calls_of_the_dense_run(monkeypatch):
    monkeypatch.setattr(call_error, "STEPS", 2)
    model, seen = EmbeddedModel("wan-plain", SMALL), {}

    def noting(name):
        def figures(planned, densities):
            seen.setdefault(name, []).append(planned.call.q.clone())
            return [(0.5,) * 6 for _ in densities]

        return figures

    arms = {"thin": 0.01, "dense": 10.0}
    for name, factor in arms.items():
        monkeypatch.setitem(call_error.ARMS, name, (call_error._radial(decay_factor=factor),))
        monkeypatch.setattr(call_error, "figures", noting(name))
        (line,) = call_error.of_calls(model, 0, name)
        assert line["calls"] == len(seen[name]) == 2 * 2 * 6
    assert all(torch.equal(one, other) for one, other in zip(seen["thin"], seen["dense"], strict=True))
    assert dit_accel.attachment_of(model.pipe.transformer) is None


@pytest.mark.slow
def test_a_run_goes_on_draws_and_refuses_other_weights(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(call_error, "STEPS", 2)
    monkeypatch.setattr(call_error, "EmbeddedModel", lambda name, call: EmbeddedModel(name, SMALL))
    out, picture = tmp_path / "out.jsonl", tmp_path / "curves.png"
    arguments = ["--models", "wan-plain", "--clips", "1", "--arms", call_error.BEST, "radial 0.2", "sol 0, pooled"]
    assert call_error.main([*arguments, "--out", str(out), "--plot", str(picture)]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == len(call_error.DENSITIES) + 2
    assert "| wan-plain | radial 0.2 | 1 |" in capsys.readouterr().out
    assert picture.stat().st_size > 5000
    before = out.read_text()
    call_error.main([*arguments, "--out", str(out)])
    assert out.read_text() == before
    out.write_text(before.replace(lines[0]["weights"], "others"))
    assert call_error.main([*arguments, "--out", str(out)]) == 2
    assert "are of other weights" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"no 'radial 0\.3'"):
        call_error.main(["--arms", "radial 0.3"])


def test_every_arm_is_one_that_some_model_takes():
    assert all(dataclasses.is_dataclass(method) for methods in call_error.ARMS.values() for method in methods)


def test_the_legend_names_methods_that_the_first_model_refuses(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    named = []
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **more: named.extend(text.get_text() for text in self.legends[0].texts)
    )
    shared = {"clip": 0, "density": 0.5, "error": 0.1, "best_error": 0.1, "best_pooled_error": 0.1}
    arms = (("picture", call_error.BEST), ("picture", "lite -4"), ("video", "lite -4"), ("video", "radial 1"))
    with contextlib.suppress(FileNotFoundError):  # nothing is written
        call_error.plot([{"model": model, "arm": arm, **shared} for model, arm in arms], tmp_path / "curves.png")
    assert {"lite", "radial"} <= set(named)
    assert len(named) == len(set(named))
