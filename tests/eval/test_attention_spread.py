"""How far attention spreads: the figures of a call, what methods put into its plan, and a run of two tiny sizes."""

import dataclasses
import json

import attention_spread
import numpy as np
import pytest
import torch
from attention_spread import CASES, MEASURED, PLAIN, Watcher, figures
from dit_accel_eval.runs.loaded import EmbeddedModel, weights_hash
from dit_accel_eval.runs.results import read_lines
from dit_accel_kernels import FrameDecay
from one_layer import MODEL, context_of
from study import RESULTS

import dit_accel
from dit_accel.adapters import installed
from dit_accel.plan.call import Call
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.plan import AttentionPlan, RowOverride

PICTURE = TokenLayout(frames=1, height=3, width=4, text_before=2)
CLIP = TokenLayout(frames=5, height=2, width=2, text_after=3)


def call_of(layout: TokenLayout) -> Call:
    q, k, v = torch.randn(3, 2, 3, layout.tokens, 8)
    return Call(q=2 * q, k=k, v=v)


def by_hand(logits: torch.Tensor, near: list[list[bool]]) -> tuple[float, float]:
    """Entropy and near mass of every row, one after the other."""
    entropies, masses = [], []
    for p in logits.double().softmax(-1).flatten(0, 1).numpy():
        for row, within in zip(p, near, strict=True):
            entropies.append(-sum(x * np.log(x) for x in row if x > 0))
            masses.append(row[within].sum())
    return float(np.mean(entropies)), float(np.mean(masses))


def test_a_pictures_attention_is_that_of_its_visual_tokens():
    call = call_of(PICTURE)
    logits = call.q[:, :, 2:] @ call.k[:, :, 2:].mT / 8**0.5
    cells = [(y, x) for y in range(3) for x in range(4)]
    near = [[max(abs(y - b), abs(x - a)) <= 1 for b, a in cells] for y, x in cells]
    entropy, mass, uniform = figures(AttentionPlan(), call, PICTURE, 1, 99)
    assert (entropy, mass) == pytest.approx(by_hand(logits, near), abs=1e-5)
    assert uniform == pytest.approx(np.mean(near))
    factors = torch.tensor([1.0, 2.0, 3.0])
    sharper = figures(AttentionPlan().scale(factors), call, PICTURE, 1, 99)
    assert sharper[:2] == pytest.approx(by_hand(logits * factors[:, None, None], near), abs=1e-5)
    assert sharper[0] < entropy
    nothing = Call(q=0 * call.q, k=call.k, v=call.v)
    assert figures(AttentionPlan(), nothing, PICTURE, 1, 99) == pytest.approx((np.log(12), uniform, uniform), abs=1e-5)


def test_a_clips_distance_is_in_frames_and_decay_and_single_rows_hold():
    call, frames = call_of(CLIP), torch.arange(20, dtype=torch.int32) // 4
    distance = (frames[:, None] - frames).abs()
    near = (distance <= 1).tolist()
    logits = call.q[:, :, :20] @ call.k[:, :, :20].mT / 8**0.5
    assert figures(AttentionPlan(), call, CLIP, 1, 99)[:2] == pytest.approx(by_hand(logits, near), abs=1e-5)
    table, padded = torch.tensor([1.0, 1.0, 0.5, 0.25, 0.5]), torch.nn.functional.pad(frames, (0, 3), value=-1)
    plan = AttentionPlan().decay(FrameDecay(table=table, q_frames=padded, k_frames=padded))
    weaker = torch.minimum(logits, table[distance.long()] * logits)
    assert figures(plan, call, CLIP, 1, 99)[:2] == pytest.approx(by_hand(weaker, near), abs=1e-5)
    keys = torch.arange(23) < 8
    plan = plan.override_rows(RowOverride(rows=torch.arange(4), keys=keys))
    weaker[:, :, :4, 8:] = -torch.inf
    assert figures(plan, call, CLIP, 1, 99)[:2] == pytest.approx(by_hand(weaker, near), abs=1e-5)


def test_the_prompts_own_calls_of_some_steps_are_measured():
    watcher, plan = Watcher(MODEL, 1, 99), AttentionPlan()
    for branch, step in (("uncond", 0), ("uncond", 1), ("cond", 0), ("cond", 3)):
        assert watcher.plan(plan, call_of(CLIP), context_of(CLIP, branch=branch, step_index=step)) is plan
    assert {step: len(calls) for step, calls in watcher.found.items()} == {0: 1}
    assert watcher.tokens == 20


def test_windows_are_half_of_what_the_models_were_trained_on():
    for name, case in CASES.items():
        family = installed.family(name)
        trained = family.trained_frames or family.trained_size[0]
        assert case.near == trained // 2
        assert next(iter(case.sizes)) == 1.0


def test_a_run_writes_and_prints_a_line_for_each_size_and_arm(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(attention_spread, "STEPS", 3)
    monkeypatch.setattr(attention_spread, "MEASURED", (0, 1, 2))
    small = {1.0: {"height": 16, "width": 16, "num_frames": 17}, 3.0: {"height": 16, "width": 16, "num_frames": 49}}
    case = dataclasses.replace(CASES["wan-tiny"], sizes=small)
    monkeypatch.setattr(attention_spread, "CASES", {"wan-tiny": case})
    out = tmp_path / "spread.jsonl"
    assert attention_spread.main(["--prompts", "1", "--rows", "8", "--out", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["size"], line["arm"], line["tokens"]) for line in lines] == [
        (1.0, PLAIN, 36), (3.0, PLAIN, 100), (3.0, "ultravico", 100),
    ]  # fmt: skip
    home, plain, decayed = lines
    assert home["mass"] > decayed["mass"] > plain["mass"] > plain["uniform_mass"]
    assert 0 < home["entropy"] < plain["entropy"] < plain["most_entropy"] == pytest.approx(np.log(100))
    assert plain["entropy"] == pytest.approx(np.mean(plain["entropy_by_step"][1:]))
    printed = capsys.readouterr().out
    assert f"| wan-tiny | 3 | ultravico | 100 | 4.61 | {decayed['entropy']:.2f} | 4 |" in printed
    assert attention_spread.main(["--table", "--out", str(out)]) == 0
    assert capsys.readouterr().out == printed


def test_factors_of_heads_act_from_the_second_step_on(monkeypatch):
    monkeypatch.setattr(attention_spread, "STEPS", 2)
    monkeypatch.setattr(attention_spread, "MEASURED", (0, 1))
    model, size = EmbeddedModel("flux-tiny", {}), {"height": 112, "width": 112}
    methods = [(), (dit_accel.UltraImage(correct=False),)]
    plain, heads = (attention_spread._run(model, 6, 0, size, one, 16).found for one in methods)
    assert plain[0] == heads[0]
    entropies = [np.mean(found[1], 0)[0] for found in (plain, heads)]
    assert entropies[1] < entropies[0] - 0.03
    assert dit_accel.attachment_of(model.pipe.transformer) is None


def test_the_committed_lines_are_of_these_models_and_cases():
    lines = read_lines(RESULTS / "attention-spread.jsonl")
    assert all(line["weights"] == weights_hash(line["model"]) for line in lines)
    expected = [
        (name, ratio, arm)
        for name, case in CASES.items()
        for ratio in case.sizes
        for arm in (PLAIN, *(case.arms if ratio > 1 else ()))
    ]
    assert [(line["model"], line["size"], line["arm"]) for line in lines] == expected
    assert all(line["prompts"] >= 4 and line["measured_steps"] == list(MEASURED) for line in lines)
    plain = {(line["model"], line["size"]): line for line in lines if line["arm"] == PLAIN}
    for line in lines:
        own = plain[line["model"], line["size"]]
        assert line["arm"] == PLAIN or (line["entropy"] < own["entropy"] and line["mass"] > own["mass"])
