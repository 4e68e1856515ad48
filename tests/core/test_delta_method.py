"""DeltaAttention: geometry of its groups, what is exact, the error it reports, what it takes back, and its state."""

import dataclasses
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from dit_accel_kernels import FrameDecay, Selection, TileLists, block_sparse_attention_eager
from hypothesis import given, settings
from hypothesis import strategies as st
from one_layer import MODEL, OneLayer, context_of, random_call
from wan_tiny import denoise, tiny_transformer

import dit_accel
from dit_accel import ConfigError, DeltaAttention, LiteAttention, RadialAttention, SolAttention, SparseD
from dit_accel.methods.attention.delta import DeltaHandler, groups_of, neighbour_correlation
from dit_accel.methods.attention.radial import RadialHandler
from dit_accel.plan.call import Call
from dit_accel.plan.exact_rows import dense_rows
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.plan import AttentionPlan, KernelResult
from dit_accel.plan.probes import probe_gaps

LAYOUT = TokenLayout(frames=5, height=4, width=6, text_before=3, text_after=7)
RADIAL = RadialAttention(
    block_size=16, decay_factor=0.2, near="half", sink=False, dense_steps=0, dense_layers=0, order="tiles"
)


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


def measured(delta: DeltaHandler) -> list[dict]:
    """The errors that it tells of in the report."""
    section = delta.report()
    return [] if section is None else section.data["measured"]


def corrected(
    delta: DeltaHandler, plan: AttentionPlan, call: Call, planned: torch.Tensor | None = None, **when
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The corrected output of a call, and the error by head where it was probed.

    ``planned`` is what the plan computed, which is left as it is; None: it is computed.
    """
    known = len(measured(delta))
    planned = sparse(plan, call) if planned is None else planned
    context = context_of(**{"layout": LAYOUT, **when})
    out = delta.after(plan, call, context, KernelResult(planned.clone())).out
    probed = measured(delta)[known:]
    return out, torch.tensor(probed[0]["by_head"], dtype=torch.float64) if probed else None


# Groups


@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)),
    text=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    stride=st.integers(1, 70),
    turn=st.integers(0, 100),
)
@settings(max_examples=100, deadline=None)
def test_groups_are_raster_runs_inside_a_frame(grid, text, stride, turn):
    frames, height, width = grid
    layout = TokenLayout(frames=frames, height=height, width=width, text_before=text[0], text_after=text[1])
    groups = groups_of(layout, stride, "cpu", turn)
    s = layout.tokens_per_frame
    assert len(groups.of) == layout.visual_tokens
    assert len(groups.rows) == frames * -(-s // stride)
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
    for step, turn in ((3, 3), (4, 4)):
        out, _ = corrected(handler(stride=5), plan_of(), call, step_index=step)
        exact = groups_of(LAYOUT, 5, "cpu", turn).rows
        torch.testing.assert_close(out[:, :, exact], dense(call)[:, :, exact])
    still, _ = corrected(handler(stride=5, rotate=False), plan_of(), call, step_index=3)
    centres = groups_of(LAYOUT, 5, "cpu").rows
    torch.testing.assert_close(still[:, :, centres], dense(call)[:, :, centres])


def test_groups_made_in_inference_mode_serve_elsewhere():
    with torch.inference_mode():
        groups = groups_of(TokenLayout(frames=2, height=3, width=31), 7, "cpu")
    assert not groups.rows.is_inference()
    assert not groups.of.is_inference()


# What is exact


@pytest.mark.parametrize("form", ["bshd", "bhsd"])
@pytest.mark.parametrize("masked", [False, True])
def test_representative_rows_are_exact_and_text_is_left_alone(form, masked):
    call = call_of(form=form)
    if masked:
        mask = torch.ones(2, 1, 1, LAYOUT.tokens, dtype=torch.bool)
        mask[1, ..., -4:] = False
        call = dataclasses.replace(call, mask=mask)
    plan = plan_of()
    before = sparse(plan, call)
    out, error = corrected(handler(stride=5), plan, call, before)
    rows, truth = groups_of(LAYOUT, 5, "cpu").rows, dense(call)
    torch.testing.assert_close(out[:, :, rows], truth[:, :, rows])
    text = [*range(3), *range(LAYOUT.tokens - 7, LAYOUT.tokens)]
    assert torch.equal(out[:, :, text], before[:, :, text])
    off = (before - truth)[:, :, rows]
    expected = off.square().sum((0, 2, 3)).sqrt() / truth[:, :, rows].square().sum((0, 2, 3)).sqrt()
    torch.testing.assert_close(error, expected)
    assert (expected > 0.01).all()


def test_every_row_a_group_is_dense_attention():
    call = call_of()
    plan = plan_of()
    out, _ = corrected(handler(stride=1), plan, call)
    truth, visual = dense(call), slice(3, 3 + LAYOUT.visual_tokens)
    torch.testing.assert_close(out[:, :, visual], truth[:, :, visual])


def test_the_correction_is_exact_where_the_loss_is_constant_in_a_group():
    """Queries of a group are equal and lie in one block row: eps (o_S - o_K) is the same for all of them."""
    layout = TokenLayout(frames=5, height=4, width=8)
    call = call_of(layout)
    call = dataclasses.replace(call, q=call.q[:, :, ::8].repeat_interleave(8, 2))
    plan = plan_of(layout, dataclasses.replace(RADIAL, order="raster"))
    out, error = corrected(handler(stride=8, shrink=False), plan, call, layout=layout)
    torch.testing.assert_close(out, dense(call))
    assert (error > 0.01).all()


def test_a_group_gets_its_representatives_difference():
    call = call_of()
    plan = plan_of()
    before = sparse(plan, call)
    out, _ = corrected(handler(stride=5, shrink=False), plan, call, before)
    groups = groups_of(LAYOUT, 5, "cpu")
    difference = (dense(call) - before)[:, :, groups.rows]
    visual = slice(3, 3 + LAYOUT.visual_tokens)
    torch.testing.assert_close((out - before)[:, :, visual], difference[:, :, groups.of])


@pytest.mark.parametrize("form", ["bshd", "bhsd"])
def test_corrections_shrink_to_how_alike_neighbours_are(form):
    """Scaled by the root of the correlation of neighbouring groups, by row and head; the representatives stay exact."""
    call = call_of(form=form)
    plan = plan_of()
    before = sparse(plan, call)
    full, _ = corrected(handler(stride=5, shrink=False), plan, call, before)
    shrunk, _ = corrected(handler(stride=5), plan, call, before)
    rows, others = groups_of(LAYOUT, 5, "cpu").rows, [6, 7, 41, 78]
    assert not set(others) & set(rows.tolist())
    assert torch.equal(shrunk[:, :, rows], full[:, :, rows])
    d = (full - before)[:, :, rows].unflatten(2, (5, -1))
    for row, h in itertools.product(range(len(d)), range(2)):
        a, b = d[row, h, :, :-1].flatten(), d[row, h, :, 1:].flatten()
        alike = float((a @ b) / (a.norm() * b.norm()))
        scale = max(alike, 0.0) ** 0.5
        torch.testing.assert_close((shrunk - before)[row, h, others], scale * (full - before)[row, h, others])


@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5)),
    same=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_likeness_is_a_share_and_one_for_equal_corrections(shape, same):
    batch, heads, frames, per_frame, width = shape
    found = torch.randn(batch, heads, frames * per_frame, width, dtype=torch.float64)
    if same:
        found = found[:, :, :1].expand_as(found)
    likeness = neighbour_correlation(found, frames)
    assert likeness.shape == found.shape[:2]
    assert ((likeness >= 0) & (likeness <= 1 + 1e-12)).all()
    if same or frames * per_frame == 1:
        torch.testing.assert_close(likeness, torch.ones(found.shape[:2], dtype=torch.float64))
    assert (neighbour_correlation(torch.zeros_like(found), frames) <= 1).all()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_dtypes_are_corrected_to_their_rounding(dtype):
    call = call_of(dtype=dtype)
    plan = plan_of()
    delta = handler(stride=5)
    out, _ = corrected(delta, plan, call)
    rows = groups_of(LAYOUT, 5, "cpu").rows
    assert out.dtype == dtype
    assert delta._measured[0][1].dtype == torch.float32
    assert torch.equal(out[:, :, rows], dense_rows(plan, call, rows))


@pytest.mark.parametrize(
    "plan",
    [
        AttentionPlan(),
        plan_of(config=dataclasses.replace(RADIAL, block_size=512)),
        AttentionPlan(head_scale=torch.ones(2)),
        AttentionPlan(selection=Selection()),
    ],
)
def test_a_plan_that_leaves_nothing_out_is_left_alone(plan):
    call = call_of()
    out = torch.full_like(call.q, torch.nan)
    delta = handler()
    assert delta.after(plan, call, context_of(LAYOUT), KernelResult(out)).out is out
    assert out.isnan().all()
    assert delta.report() is None


# Reuse and state


def test_a_correction_serves_as_many_calls_as_asked_by_layer_and_branch():
    delta, plan = handler(stride=5, reuse=3), plan_of()
    probed = []
    for number in range(7):
        call = call_of()
        probed.append(corrected(delta, plan, call)[1] is not None)
        if number == 1:
            for other in (dict(layer=1), dict(branch="uncond"), dict(transformer="transformer_2")):
                assert corrected(delta, plan, call, **other)[1] is not None
    assert probed == [True, False, False, True, False, False, True]
    delta.reset()
    assert corrected(delta, plan, call)[1] is not None


def test_a_reused_correction_is_the_one_that_was_measured():
    delta, plan = handler(stride=5, reuse=2, shrink=False), plan_of()
    call = call_of()
    before = sparse(plan, call)
    first, _ = corrected(delta, plan, call, before)
    other = call_of()
    after = sparse(plan, other)
    second, error = corrected(delta, plan, other, after)
    assert error is None
    torch.testing.assert_close(second - after, first - before)


# Re-activation


class Taker(RadialHandler):
    """Notes what it is given."""

    def __init__(self, wants: bool = True) -> None:
        super().__init__(RADIAL, MODEL)
        self.wants, self.seen = wants, []

    def restore_tiles(self, plan, context, probe, margin) -> None:
        if self.wants:
            self.seen.append((*probe(), margin))


def test_probes_go_to_the_handlers_that_want_them():
    call = call_of()
    plan, takers = plan_of(), (Taker(), Taker(wants=False))
    for reactivate in (True, False):
        delta = handler(stride=5, margin=2.5, reactivate=reactivate)
        delta.check_with(takers)
        corrected(delta, plan, call)
    assert [len(taker.seen) for taker in takers] == [1, 0]
    assert takers[0].seen[0][2] == 2.5


@pytest.mark.parametrize("form", ["bshd", "bhsd"])
@pytest.mark.parametrize("chunk", [2**26, 4 * LAYOUT.tokens])
def test_gaps_and_shares_are_those_of_the_probe_rows(form, chunk, monkeypatch):
    monkeypatch.setattr("dit_accel.plan.probes.PROBE_SCORES", chunk)
    mask = torch.ones(2, LAYOUT.tokens, dtype=torch.bool)
    mask[0, 20:60] = False
    call = call_of(form=form, mask=mask, scale=0.5)
    frames = (torch.arange(LAYOUT.tokens) // 30 - 1).int()
    decay = FrameDecay(table=torch.tensor([1.0, 0.9, 0.5]), q_frames=frames, k_frames=frames)
    plan = dataclasses.replace(plan_of(), head_scale=torch.tensor([0.7, 1.3]), frame_decay=decay)
    rows = groups_of(LAYOUT, 5, "cpu").rows
    gaps, shares = probe_gaps(plan, call, rows)
    order = plan.token_order
    q, k = call.q, call.k
    x = (q @ k.mT) * 0.5 * torch.tensor([0.7, 1.3]).double()[:, None, None]
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


LITE = LiteAttention(block_size=16, dense_steps=0, dense_layers=0, threshold=-8.0)


def test_a_tile_that_lite_dropped_for_good_comes_back_when_probes_see_it():
    """The original's main weakness: without probes the tile stays away whatever it holds."""
    errors, densities = dropping_and_returning(LITE)
    assert errors[0] < 1e-12
    assert errors[1] < 1e-5
    assert min(errors[2:]) > 0.5
    assert densities == [1.0, 0.25, 0.25, 0.25, 0.25]
    for delta in (DeltaAttention(stride=4), DeltaAttention(stride=16)):
        errors, densities = dropping_and_returning(LITE, delta)
        assert max(errors) < 1e-5  # in call 2 by the correction, from call 3 on by the tile itself
        assert densities == [1.0, 0.25, 0.25, 0.375, 0.375]
    assert dropping_and_returning(LITE, DeltaAttention(stride=4, reactivate=False))[1] == [1.0, 0.25, 0.25, 0.25, 0.25]


@pytest.mark.parametrize(
    ("back", "margin", "returns"), [(-6.0, 1.0, True), (-7.5, 1.0, False), (-7.5, 0.0, True), (-6.0, 3.0, False)]
)
def test_a_tile_comes_back_above_the_threshold_by_the_margin(back, margin, returns):
    _, densities = dropping_and_returning(LITE, DeltaAttention(stride=8, margin=margin), back=back)
    assert (densities[3] > 0.25) == returns


def test_shares_decide_where_votes_are_by_mass():
    lite = dataclasses.replace(LITE, criterion="mass", threshold=0.001)
    assert dropping_and_returning(lite)[1][3] == 0.25
    assert dropping_and_returning(lite, DeltaAttention(stride=8))[1][3] == 0.375


def test_what_must_be_skipped_stays_out():
    lite = dataclasses.replace(LITE, must_skip=(64, 80))
    assert dropping_and_returning(lite, DeltaAttention(stride=8))[1] == [0.875, 0.25, 0.25, 0.25, 0.25]


# Attached


run = functools.partial(denoise, steps=3)


def test_attached_over_radial_it_brings_the_run_nearer_to_dense_and_reports_the_error():
    transformer = tiny_transformer()
    plain = run(transformer)
    with dit_accel.attach(transformer, RADIAL) as attachment:
        without = run(transformer)
        assert attachment.report().section("delta") is None
    for methods in ((RADIAL, DeltaAttention(stride=4)), (DeltaAttention(stride=4), RADIAL)):
        with dit_accel.attach(transformer, *methods, preset="none") as attachment:
            corrected = run(transformer)
            report = attachment.report()
        assert (corrected - plain).norm() < (without - plain).norm()
        data = report.section("delta").data
        assert len(data["measured"]) == 3 * 2 * 3
        one, errors = dict(data["measured"][0]), [error for call in data["measured"] for error in call["by_head"]]
        by_head, rows = one.pop("by_head"), one.pop("rows")
        assert one == dict(transformer="transformer", step_index=0, branch="cond", layer=0, first_head=0)
        assert len(by_head) == 2
        assert all(0 < error < 1 for error in errors)
        assert data["worst"] == max(errors)
        assert data["mean"] == pytest.approx(sum(errors) / len(errors))
        assert "error at probe rows, before correction: 0." in str(report)
        assert report.to_dict()["sections"]["delta"]["measured"][0]["by_head"] == by_head
        assert report.sparse_density < 1
        assert rows == 0.25  # every fourth row, dense
        assert data["probed_rows"] == report.to_dict()["sections"]["delta"]["probed_rows"] == 18 * 0.25
        assert "18 calls probed; their rows are dense, besides the tiles: 0.250 of a call" in str(report)
    with dit_accel.attach(transformer, RADIAL, DeltaAttention(stride=1)):
        torch.testing.assert_close(run(transformer), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "method",
    [
        SolAttention(block_size=16, beta=1.5, dense_steps=0, dense_layers=0),
        SparseD(block_size=16, density=0.2, dense_steps=0, dense_layers=0),
        LiteAttention(
            block_size=16, dense_steps=0, dense_layers=0, threshold=1.0, allow_positive_threshold=True, detect_every=2
        ),
    ],
    ids=lambda method: method.name,
)
def test_every_sparse_method_can_be_corrected(method):
    """With one row a group every visual row is exact, whatever the method leaves out."""
    transformer = tiny_transformer()
    plain = run(transformer)
    with dit_accel.attach(transformer, method) as attachment:
        without = run(transformer)
        density = attachment.report().density
    assert not torch.equal(without, plain)
    with dit_accel.attach(transformer, method, DeltaAttention(stride=1, reactivate=False)) as attachment:
        torch.testing.assert_close(run(transformer), plain, rtol=1e-4, atol=1e-4)
        assert attachment.report().section("delta").data["measured"]
    assert density < 1


# Bad input


def test_alone_it_is_refused_with_what_to_add():
    transformer = tiny_transformer()
    with pytest.raises(ConfigError, match=r"delta.*sparse method.*--radial"):
        dit_accel.attach(transformer, DeltaAttention())
    assert dit_accel.attachment_of(transformer) is None


def test_a_call_that_needs_gradients_is_refused():
    transformer = tiny_transformer()
    with (
        dit_accel.attach(transformer, RADIAL, DeltaAttention()),
        pytest.raises(ConfigError, match=r"delta.*gradient.*torch\.no_grad\(\)"),
    ):
        transformer(torch.randn(1, 12, 5, 8, 8), torch.tensor([9.0]), torch.randn(1, 6, 64))


def test_a_stride_beyond_a_frame_is_remarked():
    note = handler(stride=64).check_layout(LAYOUT)
    assert note is not None
    with pytest.raises(ConfigError, match=r"delta\.stride = 64.*24 tokens"):
        raise ConfigError(note)
    assert handler(stride=24).check_layout(LAYOUT) is None


@pytest.mark.parametrize(("reuse", "expected"), [(1, 0.25), (2, 0.25 * 2 / 3), (3, 0.25 / 3)])
def test_probe_rows_count_in_the_calls_that_are_probed(reuse, expected):
    transformer = tiny_transformer()
    with dit_accel.attach(transformer, RADIAL, DeltaAttention(stride=4, reuse=reuse)) as attachment:
        run(transformer)
        report = attachment.report()
    assert report.section("delta").data["probed_rows"] == pytest.approx(expected * 18)  # planned calls
    with dit_accel.attach(transformer, RADIAL) as attachment:
        run(transformer)
        assert attachment.report().sparse_density == report.sparse_density  # tiles alone
        assert attachment.report().section("delta") is None
        assert "probe" not in str(attachment.report())
