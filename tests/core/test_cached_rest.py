"""`refresh` and `rest = "cached"`: whose turn it is to be dense, what is kept of it, and what the other calls add."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dit_accel_kernels import unpack_bits
from dit_accel_pipelines.families.wan import WAN
from one_layer import MODEL, OneLayer, context_of, random_call

from dit_accel import DFA, LVSA, LiteAttention, RadialAttention, SolAttention, SparseD, UltraViCo
from dit_accel.adapters.installed import family
from dit_accel.errors import ConfigError
from dit_accel.estimate.prediction import estimate
from dit_accel.methods import AttentionHandler, Model, Phase
from dit_accel.methods.compose import make_handlers
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.rests import KeptRest, Rests, merged, stored

CPU = torch.device("cpu")
LAYOUT = TokenLayout(frames=5, height=4, width=6, text_before=3, text_after=20)
SPARSE = dict(block_size=16, dense_steps=0, dense_layers=0, rest="cached", refresh=3)
SPARSED = SparseD(density=0.3, **SPARSE)
RADIAL = RadialAttention(decay_factor=0.2, near="half", sink=False, **SPARSE)
METHODS = {
    "sparsed": (SPARSED,),
    "sparsed by mass": (SparseD(mass=0.7, **SPARSE),),
    "sol": (SolAttention(beta=0.5, **SPARSE),),
    "radial": (RADIAL,),
    "radial by patches": (RadialAttention(order="tiles", decay_factor=0.2, near="half", sink=False, **SPARSE),),
    "lvsa": (LVSA(window=0, first=0, trained_frames=2, **SPARSE),),
    "lite": (LiteAttention(threshold=-2.0, **SPARSE),),
    "lite by mass": (LiteAttention(criterion="mass", threshold=0.05, **SPARSE),),
    "radial, sparsed and lite": (
        replace(RADIAL, rest="pooled"), SPARSED, LiteAttention(threshold=-2.0, **{**SPARSE, "rest": "skip"}),
    ),
    "radial and sol": (RADIAL, SolAttention(beta=0.0, **SPARSE)),
}  # fmt: skip


def parts_of(seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of a call, [2, 2, S, 8]; neighbours attend to the same few tokens."""
    torch.manual_seed(seed)
    call = random_call(LAYOUT, "bhsd", sharp=1.0)
    q, k = (4 * torch.randn(10, 8, dtype=torch.float64)[torch.arange(LAYOUT.tokens) // 16] for _ in range(2))
    return call.q + q, call.k + k, call.v


def test_rows_in_few_bits_are_off_by_half_a_step_of_their_own_scale():
    torch.manual_seed(0)
    drawn = torch.randn(2, 3, 7, 6, dtype=torch.float64) * torch.logspace(-6, 3, 7, dtype=torch.float64)[:, None]
    drawn[0, 0, 0] = 0
    for held in (torch.float32, torch.bfloat16, torch.float64):
        rows = drawn.to(held)
        size = rows.double().abs().amax(-1, keepdim=True)
        for dtype, most, nbytes in (("int8", 127, 6), ("int4", 7, 3)):
            kept = stored(rows, dtype)
            read, rounding = kept.read(CPU), 2 * torch.finfo(held).eps * size
            assert read.dtype == held
            assert ((read.double() - rows.double()).abs() <= 0.5001 * size / most + rounding).all()
            assert not read[0, 0, 0].any()
            assert kept.nbytes == 2 * 3 * 7 * (nbytes + 4)
        whole = stored(rows, None)
        assert torch.equal(whole.read(CPU), rows)
        assert whole.nbytes == rows.nbytes


def test_two_sets_of_keys_together_are_one_softmax_even_where_one_is_empty():
    q, k, v = (x[:, :, :11] for x in parts_of())
    logits = q @ k.mT * 8**-0.5
    first = torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    first[0, 0, 0], first[0, 0, 1] = True, False
    parts = []
    for chosen in (first, ~first):
        x = logits.masked_fill(~chosen, -torch.inf)
        parts += [(x.softmax(-1).nan_to_num() @ v), x.logsumexp(-1)]
    torch.testing.assert_close(merged(*parts), logits.softmax(-1) @ v)
    none = torch.full_like(parts[1], -torch.inf)
    nothing = merged(torch.zeros_like(v), none, torch.zeros_like(v), none)
    assert torch.equal(nothing, torch.zeros_like(v))


class Mixed(AttentionHandler):
    """Replaces a part of each head's output by V, as perturbation guidance does."""

    config_type = UltraViCo
    phase = Phase.TRANSFORMS

    def plan(self, plan, call, context):
        """Mix a quarter of V into the first head and all of it into the second, after a mean is taken off the keys."""
        return plan.centre_keys(call.k.mean(2, keepdim=True)).mix(torch.tensor([0.25, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS)
def test_calls_that_do_not_change_give_dense_attention_at_every_step(methods):
    """Whatever the tiles leave out is all there, whoever chose them: exact tiles and rest are disjoint and complete."""
    q, k, v = parts_of()
    padded = torch.ones(2, 1, 1, LAYOUT.tokens, dtype=torch.bool)
    padded[1, ..., -9:] = False
    for backend, mask in (("reference", padded), ("torch", None)):
        layer, dense = OneLayer(*methods, backend=backend), F.scaled_dot_product_attention(q, k, v, mask)
        for step in range(8):
            out = layer.call(q, k, v, LAYOUT, step=step, mask=mask)
            torch.testing.assert_close(out, dense, rtol=1e-6, atol=1e-6)
        densities = [one.density for one in layer.reports()]
        assert [round(x, 6) for x in densities[::3]] == [1.0, 1.0, 1.0]
        assert all(0 < x < 0.97 for x in (*densities[1:3], *densities[4:6], densities[7])), densities


@pytest.mark.parametrize("tokens_first", [False, True])
def test_means_of_keys_and_mixes_of_values_stay_what_they_are(tokens_first):
    q, k, v = parts_of()
    held = (lambda x: x.transpose(1, 2)) if tokens_first else (lambda x: x)
    layer = OneLayer(SPARSED, Mixed(UltraViCo(trained_frames=3), MODEL), tokens_first=tokens_first, backend="torch")
    dense = torch.lerp(F.scaled_dot_product_attention(q, k, v), v, torch.tensor([0.25, 1.0]).double()[:, None, None])
    for step in range(5):
        out = held(layer.call(*map(held, (q, k, v)), LAYOUT, step=step))
        torch.testing.assert_close(out, dense, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [None, "int8", "int4"])
def test_between_dense_calls_exact_tiles_are_new_and_the_rest_is_old(dtype):
    layer, seen = OneLayer(SparseD(density=0.3, rest_dtype=dtype, **SPARSE)), []
    layer.observe(seen.append)
    old, new = parts_of(0), parts_of(1)
    first = layer.call(*old, LAYOUT, step=0)
    torch.testing.assert_close(first, F.scaled_dot_product_attention(*old))
    out = layer.call(*new, LAYOUT, step=1)
    plan = seen[1].plan
    tiles = unpack_bits(plan.selection.keep, plan.tiles.key_tiles)
    order = plan.token_order
    chosen = tiles.repeat_interleave(16, 2).repeat_interleave(16, 3)[:, :, : LAYOUT.tokens, : LAYOUT.tokens]
    chosen = torch.empty_like(chosen).index_copy_(2, order, chosen)
    chosen = torch.empty_like(chosen).index_copy_(3, order, chosen)
    assert 0.2 < float(tiles.float().mean()) < 0.7
    parts = []
    for q, k, v in (old, new):
        logits = q @ k.mT * 8**-0.5
        parts.append((logits.softmax(-1) @ v, logits.masked_fill(~chosen, -torch.inf).softmax(-1) @ v))
    (dense_old, sparse_old), (_, sparse_new) = parts
    expected = sparse_new + dense_old - sparse_old
    error = float((out - expected).norm() / expected.norm())
    assert error < {None: 1e-6, "int8": 0.01, "int4": 0.1}[dtype]
    assert error > {None: -1.0, "int8": 1e-4, "int4": 1e-3}[dtype]
    assert not torch.allclose(out, F.scaled_dot_product_attention(*new), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS)
def test_a_dense_turn_tells_what_the_lists_before_it_would_have_been_off_by(methods):
    for layout, every in ((LAYOUT, 1), (replace(LAYOUT, frames=10, text_after=77), 2)):  # 9 query tiles, and 20
        x, other = ([part.repeat(1, 1, 3, 1)[:, :, : layout.tokens] for part in parts_of(seed)] for seed in (0, 1))
        layer, plans, outs, dense = OneLayer(*methods), [], [], F.scaled_dot_product_attention(*x)
        layer.observe(lambda seen, plans=plans: plans.append(seen.plan))
        for step, parts in enumerate((other, other, x, x)):
            outs.append(layer.call(*parts, layout, step=step))
        (section,) = (section for handler in layer.engine.handlers if (section := handler.report()) is not None)
        order = torch.arange(layout.tokens) if plans[2].token_order is None else plans[2].token_order
        rows = order[torch.arange(layout.tokens) // 16 % every == 3 % every]
        error = float((outs[2] - dense)[:, :, rows].norm() / dense[:, :, rows].norm())
        assert section.data["error"] == pytest.approx(error, rel=1e-4)
        assert 0 < error != section.data["tiles_alone"]
        assert [(call["step_index"], call["layer"]) for call in section.data["measured"]] == [(3, 0)]
        assert f"1 dense turns: {error:.3f} mean" in str(section)
        assert [(strip.steps, strip.values) for strip in section.strips] == [((3,), (section.data["error"],))]
    layer.engine.begin_run()
    assert all(handler.report() is None for handler in layer.engine.handlers)


def test_turns_without_a_kept_rest_are_plain_dense_calls():
    for config in (SparseD(density=0.3), SolAttention(), LiteAttention(threshold=-2.0)):
        layer = OneLayer(replace(config, block_size=16, dense_steps=0, dense_layers=0, refresh=3))
        for step in range(7):
            parts = parts_of(step)
            out, dense = layer.call(*parts, LAYOUT, step=step), F.scaled_dot_product_attention(*parts)
            assert torch.allclose(out, dense, rtol=1e-6, atol=1e-6) == (step % 3 == 0)
        assert [one.density == 1 for one in layer.reports()] == [step % 3 == 0 for step in range(7)]


def test_a_pattern_is_chosen_anew_at_each_turn():
    (handler,) = make_handlers([SPARSED], MODEL)
    layer, bits = OneLayer(handler), []
    for step in range(7):
        layer.call(*parts_of(step), LAYOUT, step=step)
        bits.append(next(iter(handler.bits.values())))
    assert [bits[i] is bits[i + 1] for i in range(6)] == [True, True, False, True, True, False]


def test_layers_take_turns_and_each_is_dense_once_in_so_many_calls():
    rests = Rests(4, cached=True)
    dense = np.array([[rests.is_dense(call, layer) for layer in range(12)] for call in range(20)])
    assert dense[0].all()
    assert (dense[1:].sum(1) == 3).all()
    for layer in range(12):
        gaps = np.diff(np.flatnonzero(dense[:, layer]))
        assert set(gaps[1:]) == {4}
        assert gaps[0] <= 4
    turns, second = Rests(4, cached=False), context_of(LAYOUT, layer=1)
    assert [turns.turned(second, "x").turn == "dense" for _ in range(20)] == dense[:, 1].tolist()
    assert rests.dense_share(20, range(12)) == dense.mean()
    assert rests.dense_share(0, range(12)) == 0


def test_bounded_memory_keeps_the_rests_that_hold_most_and_layers_without_room_leave_theirs_out():
    rests, each = Rests(3, cached=True, memory=192e-9), []
    assert rests.most_held == 0
    for layer, gain in enumerate([0.2, 0.4, 0.1, 0.3]):
        rest = stored(torch.ones(1, 1, 4, 4), None)  # 64 bytes
        each.append(KeptRest(exact=torch.zeros(1, 1, 1, 1, dtype=torch.int32), rest=rest, gain=gain))
        rests.keep(("transformer", layer, "cond", 0, 1), each[-1])
        assert sum(entry.nbytes for entry in rests.kept.values()) <= 200
    assert [entry.rest is not None for entry in each] == [True, True, False, True]
    assert rests.most_held == 3 * 64 + 4 * 4
    layer, skipped = OneLayer(replace(SPARSED, rest_memory=1e-9)), OneLayer(replace(SPARSED, rest="skip"))
    for step in range(2):
        out, without = (module.call(*parts_of(0), LAYOUT, step=step) for module in (layer, skipped))
        torch.testing.assert_close(out, without, rtol=1e-6, atol=1e-6)


def test_what_a_rest_holds_is_its_share_of_the_output():
    gains = []
    for size in (1.0, 100.0):
        layer, (q, k, v) = OneLayer(replace(SPARSED, rest_memory=1.0)), parts_of(0)
        layer.call(q, k, size * v, LAYOUT)
        (entry,) = layer.engine.attention[0].rests.kept.values()
        gains.append(entry.gain)
    assert 0 < gains[0] == pytest.approx(gains[1], rel=1e-5)


def test_plan_counts_the_turns_and_the_memory():
    wan = family("wan2.1-14b")
    plain = estimate(WAN, wan, methods=[SparseD(density=0.2)])
    bits, rows = plain.carried_bytes["sparsed"], 39 * 2 * 40 * 75_600  # layers, branches, heads, tokens
    for options, held in (
        (dict(refresh=4), rows * 2 * 128), (dict(refresh=4, rest_dtype="int8"), rows * (128 + 4)),
        (dict(refresh=4, rest_dtype="int4"), rows * (64 + 4)), (dict(rest_memory=8.0), 8_000_000_000),
        (dict(refresh=4, rest_offload="cpu"), 0),
    ):  # fmt: skip
        turned = estimate(WAN, wan, methods=[SparseD(density=0.2, rest="cached", **options)])
        assert turned.carried_bytes["sparsed"] == 2 * bits + held
        assert plain.speedup > turned.speedup > 1
    assert turned.tiles.density == pytest.approx(0.75 * plain.tiles.density + 0.25, abs=0.02)


def test_usual_turns_and_those_that_other_methods_and_ring_attention_rule_out():
    def handler(config):
        return make_handlers([config], MODEL)[0]

    assert (handler(SparseD()).rests, handler(SparseD(rest="cached")).rests.every) == (None, 3)
    assert not handler(SparseD(refresh=5)).rests.cached
    by_place = [handler(config).by_place for config in (RadialAttention(), RadialAttention(refresh=3), RADIAL)]
    assert by_place == [True, False, False]  # which is what ring attention asks
    for configs, match in (
        ([SparseD(refresh=3), RadialAttention(refresh=4)], r"radial\.refresh = 4 and sparsed\.refresh = 3"),
        ([SPARSED, DFA()], r"sparsed\.refresh = 3.*dfa"),
    ):
        with pytest.raises(ConfigError, match=match):
            make_handlers(configs, Model(adapter=WAN, family=None, heads=2, layers=2))
    with pytest.raises(ConfigError, match=r"radial\.rest_memory = 1\.0.*'pooled'"):
        RadialAttention(rest="pooled", rest_memory=1.0)
