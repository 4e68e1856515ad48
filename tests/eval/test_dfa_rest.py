"""What DFA's calls leave out, kept as a difference: the arms' arithmetic, what they count, and the table."""

import json
from types import SimpleNamespace

import pytest
import torch
from dfa_rest import ARMS, Tried, table
from one_layer import context_of, random_call
from study import RESULTS
from tried_rules import dense_call

from dit_accel.plan.layout import TokenLayout

LAYOUT = TokenLayout(frames=4, height=4, width=8)
OWN = torch.arange(LAYOUT.tokens) % 4 == 0


def second(name: str, *calls):
    """Return what an arm gives in the second of two calls, of which the first is full, and what computed it."""
    tried = Tried([ARMS[name]], dense=False)
    for step, call in enumerate(calls):
        tried.handler = SimpleNamespace(_reuse=step > 0, _rows_of=lambda context: ([], [OWN]))
        out, _ = tried.run(None, call, context_of(LAYOUT, step_index=step))
    return out, tried


@pytest.mark.parametrize("name", ARMS)
def test_a_step_like_the_last_full_one_is_dense_if_nothing_is_left_out_for_good(name):
    call = random_call(LAYOUT, "bhsd", dtype=torch.float32)
    out, tried = second(name, call, call)
    assert (tried.errors[0][0] < 1e-5) == (name != "strict")
    assert torch.allclose(out, dense_call(call).out, atol=1e-4) == (name != "strict")


def test_rows_and_keys_are_those_of_each_arm():
    old, new = (random_call(LAYOUT, "bhsd", dtype=torch.float32) for _ in range(2))
    dense_old, dense_new = dense_call(old), dense_call(new)
    over = []
    for call in (old, new):
        logits = call.q @ call.k.mT * call.q.shape[-1] ** -0.5
        over.append(logits.masked_fill(~OWN, -torch.inf).softmax(-1) @ call.v)
    with_rest = over[1] + dense_old.out - over[0]
    rows = OWN[:, None]
    expected = {
        "dfa": torch.where(rows, dense_new.out, dense_old.out),
        "strict": torch.where(rows, over[1], dense_old.out),
        "strict, cached rest": torch.where(rows, with_rest, dense_old.out),
        "all rows, over the foreground, cached rest": with_rest,
        "dfa, background over the foreground, cached rest": torch.where(rows, dense_new.out, with_rest),
    }
    shares = dict(zip(expected, (1 / 4, 1 / 16, 1 / 16, 1 / 4, 7 / 16), strict=True))
    for name, wanted in expected.items():
        out, tried = second(name, old, new)
        torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-4)
        assert tried.shares == [[1.0, shares[name]]], name
    _, tried = second("all rows, over as many tiles by mass, cached rest", old, new)
    assert tried.shares[0][1] == pytest.approx(1 / 4, abs=1 / 8)


def test_the_table_shows_what_ran():
    lines = [json.loads(line) for line in (RESULTS / "dfa-rest.jsonl").read_text().splitlines()]
    shown = table(lines)
    for line in lines:
        assert f"| {line['num_inference_steps']} | {line['every']} | {line['arm']} | 4 |" in shown
