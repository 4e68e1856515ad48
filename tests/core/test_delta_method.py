"""DeltaAttention: geometry of its groups, what is exact, the error it reports, what it takes back, and its state."""

import dataclasses
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
import wan_tiny
from dit_accel_kernels import FrameDecay, Selection, TileLists, block_sparse_attention_eager
from hypothesis import given, settings
from hypothesis import strategies as st
from one_layer import MODEL, OneLayer, context_of, layout_of, random_call
from wan_tiny import denoise, tiny_transformer

import dit_accel
from dit_accel import DeltaAttention, LiteAttention, RadialAttention
from dit_accel.methods.attention.delta import DeltaHandler, groups_of, neighbour_correlation
from dit_accel.plan.call import Call
from dit_accel.plan.exact_rows import dense_rows
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.plan import AttentionPlan, KernelResult
from dit_accel.plan.probes import probe_gaps

LAYOUT = TokenLayout(frames=5, height=4, width=6, text_before=3, text_after=7)
ALWAYS = dict(block_size=16, dense_steps=0, dense_layers=0)
RADIAL = dataclasses.replace(wan_tiny.RADIAL, order="tiles")


def call_of(layout: TokenLayout = LAYOUT, **changes) -> Call:
    return random_call(layout, backend="reference", **changes)


def plan_of(layout: TokenLayout = LAYOUT, config: RadialAttention = RADIAL) -> AttentionPlan:
    settings = config.filled()
    return AttentionPlan().with_tiles(settings.tiles(layout), settings.token_order(layout))


def sparse(plan: AttentionPlan, call: Call) -> torch.Tensor:
    """What a plan computes, [B, H, S, D], lying as the call's tensors do."""
    out = block_sparse_attention_eager(
        *call.as_held(call.q, call.k, call.v),
        plan.tiles or TileLists.full(LAYOUT.tokens, LAYOUT.tokens, block_q=16, block_k=16),
        **call.kernel_layout, scale=call.scale, head_scale=plan.head_scale, key_mask=call.key_mask(),
        frame_decay=plan.frame_decay, token_order=plan.token_order, identity_mix=plan.identity_mix, backend="reference",
    )  # fmt: skip
    return call.heads_first(out)


def dense(call: Call) -> torch.Tensor:
    """Dense attention by torch, [B, H, S, D] in float64."""
    q, k, v = (x.double() for x in (call.q, call.k, call.v))
    mask = None if call.key_mask() is None else call.key_mask()[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, mask, scale=call.scale)


def handler(**options) -> DeltaHandler:
    return DeltaHandler(DeltaAttention(**options), MODEL)


def corrected(
    delta: DeltaHandler, plan: AttentionPlan, call: Call, planned: torch.Tensor | None = None, **when
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The corrected output of a call, and the error by head where it was probed.

    ``planned`` is what the plan computed, which is left as it is; None: it is computed.
    """

    def measured() -> list[dict]:
        section = delta.report()
        return [] if section is None else section.data["measured"]

    before = len(measured())
    planned = sparse(plan, call) if planned is None else planned
    out = delta.after(plan, call, context_of(**{"layout": LAYOUT, **when}), KernelResult(planned.clone())).out
    probed = measured()[before:]
    return out, torch.tensor(probed[0]["by_head"], dtype=torch.float64) if probed else None


@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)),
    text=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    stride=st.integers(1, 70),
    turn=st.integers(0, 100),
)
@settings(max_examples=40, deadline=None)
def test_groups_are_raster_runs_inside_a_frame(grid, text, stride, turn):
    layout = layout_of(grid, text)
    groups, s = groups_of(layout, stride, "cpu", turn), layout.tokens_per_frame
    assert len(groups.of) == layout.visual_tokens
    assert len(groups.rows) == layout.frames * -(-s // stride)
    members = [[] for _ in groups.rows]
    for token, group in enumerate(groups.of.tolist()):
        members[group].append(token)
    for row, tokens in zip((groups.rows - text[0]).tolist(), members, strict=True):
        assert tokens == list(range(tokens[0], tokens[-1] + 1))
        assert tokens[0] // s == tokens[-1] // s
        assert len(tokens) == stride or tokens[-1] % s == s - 1
        assert (tokens[0] % s) % stride == 0
        assert row in tokens
        assert turn or row == tokens[len(tokens) // 2]


def test_representatives_move_and_every_row_has_its_turn():
    layout = TokenLayout(frames=2, height=4, width=8)
    rows = [groups_of(layout, 16, "cpu", turn).rows[0].item() for turn in range(26)]
    assert set(rows) == set(range(16))
    assert all(abs(a - b) > 2 for a, b in itertools.pairwise(rows))
    call = call_of()
    for step, turn, rotate in ((3, 3, True), (4, 4, True), (3, 0, False)):
        out, _ = corrected(handler(stride=5, rotate=rotate), plan_of(), call, step_index=step)
        exact = groups_of(LAYOUT, 5, "cpu", turn).rows
        torch.testing.assert_close(out[:, :, exact], dense(call)[:, :, exact])


@pytest.mark.parametrize("form", ["bshd", "bhsd"])
@pytest.mark.parametrize("masked", [False, True])
def test_representative_rows_are_exact_and_text_is_left_alone(form, masked):
    mask = torch.ones(2, 1, 1, LAYOUT.tokens, dtype=torch.bool)
    mask[1, ..., -4:] = False
    call, plan = call_of(form=form, mask=mask if masked else None), plan_of()
    before, truth, rows = sparse(plan, call), dense(call), groups_of(LAYOUT, 5, "cpu").rows
    out, error = corrected(handler(stride=5), plan, call, before)
    torch.testing.assert_close(out[:, :, rows], truth[:, :, rows])
    text = [*range(3), *range(LAYOUT.tokens - 7, LAYOUT.tokens)]
    assert torch.equal(out[:, :, text], before[:, :, text])
    off, truth = (before - truth)[:, :, rows], truth[:, :, rows]
    expected = off.square().sum((0, 2, 3)).sqrt() / truth.square().sum((0, 2, 3)).sqrt()
    torch.testing.assert_close(error, expected)
    assert (expected > 0.01).all()


@pytest.mark.parametrize("form", ["bshd", "bhsd"])
def test_a_group_gets_its_representatives_difference_as_far_as_neighbours_are_alike(form):
    """Scaled by the root of the correlation of neighbouring groups, by row and head; the representatives stay exact."""
    call, plan, groups = call_of(form=form), plan_of(), groups_of(LAYOUT, 5, "cpu")
    before = sparse(plan, call)
    full, _ = corrected(handler(stride=5, shrink=False), plan, call, before)
    shrunk, _ = corrected(handler(stride=5), plan, call, before)
    difference, visual = (dense(call) - before)[:, :, groups.rows], slice(3, 3 + LAYOUT.visual_tokens)
    torch.testing.assert_close((full - before)[:, :, visual], difference[:, :, groups.of])
    assert torch.equal(shrunk[:, :, groups.rows], full[:, :, groups.rows])
    others, frames = [6, 7, 41, 78], difference.unflatten(2, (5, -1))
    assert not {*others} & {*groups.rows.tolist()}
    for row, h in itertools.product(range(2), range(2)):
        a, b = frames[row, h, :, :-1].flatten(), frames[row, h, :, 1:].flatten()
        scale = max(float((a @ b) / (a.norm() * b.norm())), 0.0) ** 0.5
        torch.testing.assert_close((shrunk - before)[row, h, others], scale * (full - before)[row, h, others])


def test_likeness_is_one_for_equal_corrections_and_a_share_for_none():
    found = torch.randn(2, 3, 1, 5, dtype=torch.float64).expand(-1, -1, 8, -1)
    for frames in (1, 2, 8):
        torch.testing.assert_close(neighbour_correlation(found, frames), torch.ones_like(found[:, :, 0, 0]))
    assert (neighbour_correlation(torch.zeros_like(found), 2) <= 1).all()


@pytest.mark.parametrize("form", ["bshd", "bhsd"])
def test_the_exact_rows_follow_the_plans_other_parts(form):
    """Head scales, frame decay and identity mix stay; only what is left out comes back."""
    call = call_of(form=form)
    frames = torch.full((LAYOUT.tokens,), -1, dtype=torch.int32)
    frames[3 : 3 + LAYOUT.visual_tokens] = torch.arange(5, dtype=torch.int32).repeat_interleave(24)
    decay = FrameDecay(table=torch.tensor([1.0, 0.9, 0.5]), q_frames=frames, k_frames=frames)
    parts = dict(head_scale=torch.tensor([0.7, 1.3]), frame_decay=decay, identity_mix=torch.tensor([0.0, 0.4]))
    rows = groups_of(LAYOUT, 5, "cpu").rows
    found = dense_rows(dataclasses.replace(plan_of(), **parts), call, rows)
    torch.testing.assert_close(found, sparse(AttentionPlan(**parts), call)[:, :, rows])


def test_a_plan_that_leaves_nothing_out_is_left_alone():
    for plan in (
        AttentionPlan(),
        plan_of(config=dataclasses.replace(RADIAL, block_size=512)),
        AttentionPlan(head_scale=torch.ones(2)),
        AttentionPlan(selection=Selection()),
    ):
        call = call_of()
        out = torch.full_like(call.q, torch.nan)
        delta = handler()
        assert delta.after(plan, call, context_of(LAYOUT), KernelResult(out)).out is out
        assert out.isnan().all()
        assert delta.report() is None


def test_a_correction_serves_as_many_calls_as_asked_by_layer_and_branch():
    delta, plan = handler(stride=5, reuse=3, shrink=False), plan_of()
    probed, added = [], []
    for number in range(7):
        call = call_of()
        before = sparse(plan, call)
        out, error = corrected(delta, plan, call, before)
        probed.append(error is not None)
        added.append(out - before)
        if number == 1:
            for other in (dict(layer=1), dict(branch="uncond"), dict(transformer="transformer_2")):
                assert corrected(delta, plan, call, **other)[1] is not None
    assert probed == [True, False, False, True, False, False, True]
    torch.testing.assert_close(added[1], added[0])
    delta.reset()
    assert corrected(delta, plan, call)[1] is not None


@pytest.mark.parametrize("form", ["bshd", "bhsd"])
@pytest.mark.parametrize("chunk", [2**26, 4 * LAYOUT.tokens])
def test_gaps_and_shares_are_those_of_the_probe_rows(form, chunk, monkeypatch):
    monkeypatch.setattr("dit_accel.plan.probes.PROBE_SCORES", chunk)
    mask = torch.ones(3, LAYOUT.tokens, dtype=torch.bool)
    mask[0, 20:60] = mask[1, 5:] = mask[2, ::3] = False
    call = call_of(form=form, mask=mask, scale=0.5, batch=3)
    frames = (torch.arange(LAYOUT.tokens) // 30 - 1).int()
    decay = FrameDecay(table=torch.tensor([1.0, 0.9, 0.5]), q_frames=frames, k_frames=frames)
    scale = torch.tensor([[0.7, 1.3], [1.0, 0.2], [3.0, 0.5]])
    plan = dataclasses.replace(plan_of(), head_scale=scale, frame_decay=decay)
    rows = groups_of(LAYOUT, 5, "cpu").rows
    gaps, shares = probe_gaps(plan, call, rows)
    order = plan.token_order
    q, k = call.q, call.k
    x = (q @ k.mT) * 0.5 * scale.double()[:, :, None, None]
    t = torch.tensor([1.0, 0.9, 0.5])[(frames[:, None] - frames).abs().clamp(max=2).long()].double()
    t[(frames[:, None] < 0) | (frames < 0)] = 1
    x = torch.minimum(x, t * x).masked_fill(~mask[:, None, None], -torch.inf)
    p = x.softmax(-1)
    x = (x - x.amax(-1, keepdim=True)) / torch.log(torch.tensor(2.0).double())
    places = {token: place for place, token in enumerate(order.tolist())}
    for i in range(plan.tiles.query_tiles):
        probes = [token for token in rows.tolist() if places[token] // 16 == i]
        for j in range(plan.tiles.key_tiles):
            keys = order[16 * j : 16 * (j + 1)]
            if not probes:
                assert (gaps[:, :, i, j] == -torch.inf).all()
                assert (shares[:, :, i, j] == 0).all()
                continue
            torch.testing.assert_close(gaps[:, :, i, j], x[:, :, probes][..., keys].amax((-1, -2)))
            torch.testing.assert_close(shares[:, :, i, j], p[:, :, probes][..., keys].sum(-1).amax(-1))


def dropping_and_returning(*methods, back: float = 6.0) -> tuple[list[float], list[float]]:
    """Three quarters of the keys matter to nobody for two calls, then one tile of them does; error and density by call.

    Log2 gaps of the others are -20, that of the returning tile in the end is ``back`` above the best.
    """
    torch.manual_seed(0)
    layer, layout = OneLayer(*methods), TokenLayout(frames=2, height=4, width=16)
    q = torch.zeros(1, 2, layout.tokens, 8, dtype=torch.float64)
    q[..., 0] = 1
    v = torch.randn(1, 2, layout.tokens, 8, dtype=torch.float64)
    errors = []
    for step in range(5):
        k = torch.zeros_like(q)
        k[:, :, 32:, 0] = -20 / 1.4426950408889634
        if step >= 2:
            k[:, :, 64:80, 0] = back / 1.4426950408889634
        truth = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        found = layer.call(q, k, v, layout, step=step, scale=1.0)
        errors.append(float((found - truth).norm() / truth.norm()))
    return errors, [step.density for step in layer.reports()]


LITE = LiteAttention(**ALWAYS, threshold=-8.0)


def test_a_tile_that_lite_dropped_for_good_comes_back_when_probes_see_it():
    """The original's main weakness: without probes the tile stays away whatever it holds."""
    errors, densities = dropping_and_returning(LITE)
    assert errors[0] < 1e-12
    assert errors[1] < 1e-5
    assert min(errors[2:]) > 0.5
    assert densities == [1.0, 0.25, 0.25, 0.25, 0.25]
    for options in (dict(stride=4), dict(stride=16), dict(stride=4, reactivate=False)):
        errors, densities = dropping_and_returning(LITE, DeltaAttention(**options))
        assert max(errors) < 1e-5  # in call 2 by the correction, from call 3 on by the tile itself
        back = 0.25 if "reactivate" in options else 0.375
        assert densities == [1.0, 0.25, 0.25, back, back]


def test_a_tile_comes_back_above_the_threshold_by_the_margin():
    """By shares where votes are by mass, and never where it must be skipped."""
    for lite, delta, back, densities in (
        (dict(), dict(margin=1.0), -6.5, [0.25, 0.375]),
        (dict(), dict(margin=1.0), -7.5, [0.25, 0.25]),
        (dict(), dict(margin=0.0), -7.5, [0.25, 0.375]),
        (dict(), dict(margin=3.0), -6.0, [0.25, 0.25]),
        (dict(criterion="mass", threshold=0.001), dict(), 6.0, [0.25, 0.375]),
        (dict(must_skip=(64, 80)), dict(), 6.0, [0.25, 0.25]),
    ):
        config = dataclasses.replace(LITE, **lite)
        assert dropping_and_returning(config, DeltaAttention(stride=8, **delta), back=back)[1][2:4] == densities
        assert dropping_and_returning(config, back=back)[1][3] == 0.25


run = functools.partial(denoise, steps=3)


def test_attached_over_radial_it_brings_the_run_nearer_to_dense_and_reports_the_error():
    transformer = tiny_transformer()
    plain = run(transformer)
    with dit_accel.attach(transformer, RADIAL) as attachment:
        without, sparse = run(transformer), attachment.report()
    assert sparse.section("delta") is None
    for reuse, probed in ((1, 18), (2, 12), (3, 6)):
        with dit_accel.attach(transformer, RADIAL, DeltaAttention(stride=4, reuse=reuse)) as attachment:
            corrected = run(transformer)
            report = attachment.report()
        assert (corrected - plain).norm() < (without - plain).norm()
        assert report.sparse_density == sparse.sparse_density  # tiles alone
        data = report.section("delta").data
        assert len(data["measured"]) == probed
        errors = [error for call in data["measured"] for error in call["by_head"]]
        assert len(errors) == 2 * probed
        assert all(0 < error < 1 for error in errors)
        assert data["worst"] == max(errors)
        assert data["mean"] == pytest.approx(sum(errors) / len(errors))
        assert data["probed_rows"] == probed * 0.25  # every fourth row, dense


def test_a_stride_beyond_a_frame_is_remarked():
    assert "delta.stride = 64" in handler(stride=64).check_layout(LAYOUT)
    assert handler(stride=24).check_layout(LAYOUT) is None
