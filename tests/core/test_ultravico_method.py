"""UltraViCo: its decay as published, its config, what it puts into the plan, and what that computes."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from one_layer import ADAPTER, FAMILY, MODEL, Fixed, OneLayer, context_of, random_call
from wan_tiny import RADIAL, denoise, tiny_transformer

import dit_accel
from dit_accel import ConfigError, DeltaAttention, UltraViCo
from dit_accel.adapters import installed
from dit_accel.adapters.adapter import Adapter, Family
from dit_accel.adapters.installed import adapters
from dit_accel.methods.attention.delta import DeltaHandler
from dit_accel.methods.attention.ultravico import UltraViCoHandler, first_frame_override, frame_decay, mean_key
from dit_accel.methods.base import Model, Phase
from dit_accel.plan.call import Call
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.plan import AttentionPlan
from dit_accel.rules.ultravico import DecayRule, extended_frames, output_frames, strengths
from dit_accel.testing.recording import recorded
from dit_accel.testing.reference import attention, tile_states

LAYOUT = TokenLayout(frames=7, height=3, width=5, text_before=4, text_after=9)
ACTIVE = UltraViCo(alpha=0.5, beta=0.2, period=3, gamma=0.5, trained_frames=2, first_frame=True)


context = functools.partial(context_of, LAYOUT, step_index=2)
call_of = functools.partial(random_call, LAYOUT)


def on(config: UltraViCo, adapter: Adapter, family: Family | None) -> UltraViCoHandler:
    return UltraViCoHandler(config, Model(adapter=adapter, family=family, heads=2, layers=3))


def handler(config: UltraViCo = ACTIVE, family: Family | None = FAMILY) -> UltraViCoHandler:
    return UltraViCoHandler(config, dataclasses.replace(MODEL, family=family))


def test_recipes_fill_what_is_unset():
    recipe = {"period": 6.0, "gamma": 1.0, "first_frame": True, "by_ratio": ((2.0, 0.95, 0.7), (4.0, 0.9, None))}
    family = dataclasses.replace(FAMILY, recipes={"ultravico": recipe})

    def filled(**options):
        return on(UltraViCo(**options), ADAPTER, family)

    assert filled().rule(6) == DecayRule(trained_frames=3, alpha=0.95, beta=0.7, period=6.0, gamma=1.0)
    assert filled().rule(12).beta == 0.6  # none is published: the safe one
    assert filled(alpha=0.5).rule(6).beta == 0.5  # never above alpha
    assert filled(beta=0.3).rule(6).beta == 0.3
    with pytest.raises(ConfigError, match=r"beta = 0\.99 and alpha = 0\.95"):
        filled(beta=0.99).rule(6)
    assert filled().settings.first_frame
    assert filled(first_frame=False).settings.first_frame is False
    assert on(UltraViCo(), ADAPTER, FAMILY).rule(6) == DecayRule(trained_frames=3, alpha=0.9)
    unknown = dataclasses.replace(FAMILY, trained_frames=None)
    assert on(UltraViCo(trained_frames=5), ADAPTER, unknown).settings.trained_frames == 5
    for options, known, text in (
        (dict(), None, r"ultravico.*length.*any, .*sizes"),
        (dict(), unknown, r"ultravico.*length.*some .*ultravico\.trained_frames"),
        (dict(gamma=4), FAMILY, r"gamma = 4.*ultravico\.period"),
        (dict(beta=0.6), FAMILY, r"beta = 0\.6.*bands"),
        (dict(period=9), FAMILY, r"period = 9.*ultravico\.gamma"),
    ):
        with pytest.raises(ConfigError, match=text):
            on(UltraViCo(**options), ADAPTER, known)


def test_only_visual_tokens_have_a_frame():
    found = frame_decay(DecayRule(trained_frames=2, alpha=0.5), LAYOUT, "cpu")
    expected = [-1] * 4 + [frame for frame in range(7) for _ in range(15)] + [-1] * 9
    assert found.q_frames.tolist() == found.k_frames.tolist() == expected
    assert found.table.tolist() == [1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5]


def test_the_first_frame_sees_text_and_the_trained_length():
    apart = first_frame_override(2, LAYOUT, "cpu")
    assert apart.rows.tolist() == list(range(4, 19))
    assert apart.keys.tolist() == [True] * (4 + 2 * 15) + [False] * (5 * 15) + [True] * 9


def planned(call: Call, config: UltraViCo = ACTIVE) -> AttentionPlan:
    return handler(config).plan(AttentionPlan(), call, context())


@pytest.mark.parametrize("form", ["bshd", "bhsd"])
def test_keys_are_centred_over_the_valid_ones(form):
    mask = torch.ones(2, LAYOUT.tokens, dtype=torch.bool)
    mask[1, -20:] = False
    call = call_of(form, mask=mask)
    call.k.masked_fill_(~mask[:, None, :, None], torch.nan)
    found = mean_key(call)
    for row in range(2):
        expected = call.k[row][:, mask[row]].mean(1)
        torch.testing.assert_close(found[row, :, 0], expected)
    low = dataclasses.replace(call, k=call.k.bfloat16())
    assert mean_key(low).dtype == torch.float32
    plan = planned(call)
    assert torch.equal(plan.centred(low.k).nan_to_num(), (low.k - plan.key_mean).bfloat16().nan_to_num())
    assert planned(call, dataclasses.replace(ACTIVE, center_keys=False)).key_mean is None


def test_it_applies_beyond_the_trained_length_and_where_anything_changes():
    for options, frames, applies in (
        (dict(), 7, True),
        (dict(), 4, True),
        (dict(), 3, False),
        (dict(trained_frames=7), 7, False),
        (dict(alpha=1.0), 7, False),
        (dict(alpha=1.0, beta=0.9, period=4, gamma=1), 7, True),
        (dict(alpha=1.0, first_frame=True), 7, True),
    ):
        made, layout = handler(UltraViCo(**options)), dataclasses.replace(LAYOUT, frames=frames)
        assert made.applies(layout) == applies
        if frames == 3:
            assert "changes nothing" in made.check_layout(layout)


def by_hand(q, k, v, layout: TokenLayout, config: UltraViCo, rule: DecayRule) -> torch.Tensor:
    """The paper's formula over pairs of tokens, [B, H, S, D] in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    if config.center_keys:
        k = k - k.mean(2, keepdim=True)
    x, text, s = q @ k.mT * q.shape[-1] ** -0.5, layout.text_before, layout.tokens_per_frame
    frames = [slice(text + frame * s, text + (frame + 1) * s) for frame in range(layout.frames)]
    bands = [m * rule.period for m in range(1, 9)] if rule.beta else []
    for a, b in itertools.product(range(layout.frames), repeat=2):
        distance, pairs = abs(a - b), x[:, :, frames[a], frames[b]]
        if distance > rule.trained_frames / 2:
            factor = rule.beta if any(abs(distance - band) <= rule.gamma for band in bands) else rule.alpha
            pairs[pairs > 0] *= factor
        if config.first_frame and a == 0 and b >= rule.trained_frames:
            pairs[:] = -torch.inf
    return x.softmax(-1) @ v


run = functools.partial(denoise, steps=3)


@pytest.mark.sample
@pytest.mark.parametrize(
    "changes",
    [{}, dict(first_frame=False), dict(center_keys=False), dict(beta=None, period=None, gamma=None, alpha=0.9)],
    ids=["all", "no first frame", "not centred", "alpha alone"],
)
@pytest.mark.parametrize("name", ["wan", "hunyuan-video"])
def test_every_call_is_the_formula(name, changes):
    model = {"wan": tiny_models.WAN[0], "hunyuan-video": tiny_models.HUNYUAN[0]}[name]
    torch.manual_seed(0)
    transformer = model.transformer(**model.config).eval().double()
    config = dataclasses.replace(ACTIVE, **changes)
    inputs = {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in model.inputs(1).items()}
    inputs.pop("encoder_attention_mask", None) if name == "wan" else inputs["encoder_attention_mask"].fill_(1)
    context = transformer.cache_context("cond", step_index=0, num_inference_steps=4)
    with dit_accel.attach(transformer, config) as attachment, recorded(attachment) as calls, torch.no_grad(), context:
        transformer(**inputs, return_dict=False)
    call, layout = calls[-1], calls[-1].context.layout
    rule = on(config, adapters()[name], None).rule(layout.frames)
    assert layout.frames > rule.trained_frames
    expected = by_hand(call.q, call.k, call.v, layout, config, rule)  # centring twice changes nothing
    torch.testing.assert_close(call.out, expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", ["bshd", "bhsd"])
def test_gradients_are_autograds_of_the_plan_written_out(form, masked):
    mask = torch.ones(2, LAYOUT.tokens, dtype=torch.bool)
    mask[1, -5:] = False
    call = call_of(form, mask=mask if masked else None)
    q, k, v = (x.requires_grad_() for x in (call.q, call.k, call.v))
    grad, radial = torch.randn_like(q), RADIAL.filled()
    listed = AttentionPlan().with_tiles(radial.tiles(LAYOUT), radial.token_order(LAYOUT)).mix(torch.tensor([0.0, 0.3]))
    layer, seen = OneLayer(Fixed(listed), handler(), backend="torch", tokens_first=call.tokens_first), []
    layer.observe(seen.append)
    made = layer.call(*call.as_held(q, k, v), LAYOUT, mask=call.mask)
    found = torch.autograd.grad(call.heads_first(made), (q, k, v), grad)
    plan = seen[0].plan
    assert None not in (plan.tiles, plan.frame_decay, plan.row_override, plan.key_mean, plan.identity_mix)
    states = tile_states(plan, 2, LAYOUT.tokens, None)
    out = attention(plan, states, q, k - mean_key(call), v, call.mask, None)
    mix = plan.identity_mix[:, None, None].double()
    mixed = (1 - mix) * out + mix * v
    torch.testing.assert_close(call.heads_first(made), mixed)
    expected = torch.autograd.grad(mixed, (q, k, v), grad)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_first_frame_keeps_its_rule_under_correction():
    transformer = tiny_transformer()
    with (
        dit_accel.attach(transformer, RADIAL, DeltaAttention(stride=4), ACTIVE) as attachment,
        recorded(attachment) as calls,
    ):
        run(transformer, steps=1)
    call, layout = calls[0], calls[0].context.layout
    size, v = layout.tokens_per_frame, call.v.clone()
    v[:, :, 2 * size :] += 100.0  # frames that the first one must not see
    plan = dataclasses.replace(call.plan, key_mean=None)  # the call's keys are centred
    layer = OneLayer(Fixed(plan), DeltaHandler(DeltaAttention(stride=4), MODEL), backend="torch")
    torch.testing.assert_close(layer.call(call.q, call.k, call.v, layout), call.out)
    out = layer.call(call.q, call.k, v, layout)
    torch.testing.assert_close(out[:, :, :size], call.out[:, :, :size])
    assert (out[:, :, size:] - call.out[:, :, size:]).abs().max() > 1


class Looking(Fixed):
    """A method that selects by logits: it checks what it sees."""

    phase = Phase.SELECTIONS

    def plan(self, plan, call, context):
        assert call.k.mean(2).abs().max() < 1e-6
        self.given = plan
        return plan


def test_methods_that_look_at_keys_see_the_centred_ones():
    looking, call = Looking(AttentionPlan()), call_of("bhsd")
    OneLayer(handler(), looking).call(call.q, call.k + 3, call.v, LAYOUT)
    assert looking.given.frame_decay is not None


def test_models_without_frames_or_a_known_length_refuse_it():
    model = tiny_models.FLUX[0]
    with pytest.raises(ConfigError, match=r"ultravico.*flux.*image"):
        dit_accel.attach(model.transformer(**model.config), UltraViCo(trained_frames=2))
    (described,) = dit_accel.describe(tiny_transformer()).transformers
    assert described.needs["ultravico"] == "trained_frames"
    assert "ultravico" not in {**described.methods, **described.refused}


def test_wan_at_three_times_its_length_and_hunyuan_at_four_have_their_published_tables():
    t = DecayRule(trained_frames=21, alpha=0.9).table(63)
    assert t.dtype == np.float32
    assert t.tolist() == [1.0] * 11 + [np.float32(0.9)] * 52
    t = DecayRule(trained_frames=33, alpha=0.9, beta=0.8, period=50, gamma=4).table(132)
    bands = {*range(46, 55), *range(96, 105)}
    expected = [1.0 if d <= 16 else 0.8 if d in bands else 0.9 for d in range(132)]
    assert t.tolist() == np.float32(expected).tolist()


@given(
    trained=st.integers(1, 40), frames=st.integers(1, 160), alpha=st.floats(0.1, 1), beta=st.floats(0.1, 1),
    period=st.floats(1.5, 60), gamma=st.floats(0, 8),
)  # fmt: skip
def test_the_table_is_the_formula(trained, frames, alpha, beta, period, gamma):
    """The window goes before bands, and distance 0 is in none."""
    t = DecayRule(trained_frames=trained, alpha=alpha, beta=beta, period=period, gamma=gamma).table(frames)
    for d in range(frames):
        in_band = any(abs(d - m * period) <= gamma for m in range(1, 200))
        assert t[d] == np.float32(1.0 if d <= trained / 2 else beta if in_band else alpha)


PUBLISHED = [
    ("wan2.1-1.3b", 21, {2: (0.9, None), 3: (0.9, None), 4: (0.9, None)}, None, None),
    ("hunyuan-video", 33, {2: (0.95, 0.6), 3: (0.9, 0.6), 4: (0.9, 0.8), 5: (0.9, 0.8)}, 50, 4),
    ("cogvideox-5b", 13, {2: (0.9, 0.6), 3: (0.9, 0.6), 4: (0.85, 0.6)}, 20, 1),
]


@pytest.mark.parametrize(("name", "trained", "by_ratio", "period", "gamma"), PUBLISHED, ids=lambda x: str(x)[:15])
def test_published_defaults(name, trained, by_ratio, period, gamma):
    family = installed.family(name)
    adapter = next(adapter for adapter in installed.adapters().values() if family in adapter.families)
    for ratio, (alpha, beta) in by_ratio.items():
        rule = on(UltraViCo(), adapter, family).rule(trained * ratio)
        assert rule == DecayRule(trained_frames=trained, alpha=alpha, beta=beta, period=period, gamma=gamma)
    assert on(UltraViCo(), adapter, family).settings.first_frame == (name == "wan2.1-1.3b")


def test_known_trained_lengths_are_what_the_default_output_has():
    """Where a released model has one native length, its default output has it; the embedded one has two."""
    lengths = {name: family.trained_frames for name, family in installed.families().items()}
    assert [lengths[name] for name in ("wan2.1-14b", "wan2.2-ti2v-5b", "wan-plain", "helios-14b", "flux.1-dev")] == [
        21, 31, 17, None, None
    ]  # fmt: skip
    for family in installed.families().values():
        if family.trained_frames is not None and family.name != "wan-plain":
            assert output_frames(family.trained_frames * family.patch[0], family.vae[0]) == family.num_frames, family


def test_the_nearest_ratio_counts_and_of_two_the_larger():
    table = ((2.0, 0.95, 0.6), (3.0, 0.9, None), (4.0, 0.85, 0.8))
    assert [strengths(table, ratio) for ratio in (1.1, 2.5, 3.4, 9.0)] == [
        (0.95, 0.6), (0.9, None), (0.9, None), (0.85, 0.8)
    ]  # fmt: skip


def test_the_output_frames_of_a_ratio():
    assert [extended_frames(21, ratio, 4) for ratio in (1, 2, 3, 4)] == [81, 165, 249, 333]
    assert extended_frames(33, 3, 4) == 393
    assert extended_frames(13, 1.5, 4) == 77  # 19.5 latent frames are 20
    assert extended_frames(17, 2, 2) == 67
