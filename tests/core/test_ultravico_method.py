"""UltraViCo: its config, what it puts into the plan, what that computes, and how it meets models and other methods."""

import dataclasses
import functools

import pytest
import tiny_models
import torch
from one_layer import ADAPTER, MODEL, Fixed, OneLayer, context_of, random_call
from wan_tiny import denoise, tiny_transformer

import dit_accel
from dit_accel import (
    ConfigError,
    DeltaAttention,
    LiteAttention,
    RadialAttention,
    UltraViCo,
)
from dit_accel.adapters.adapter import Adapter, Family
from dit_accel.adapters.installed import adapters
from dit_accel.attachment.backends import UnplannedRun
from dit_accel.methods import registry
from dit_accel.methods.attention.delta import DeltaHandler
from dit_accel.methods.attention.ultravico import UltraViCoHandler, first_frame_override, frame_decay, mean_key
from dit_accel.methods.base import AttentionHandler, Model, Phase
from dit_accel.methods.config import MethodConfig
from dit_accel.plan.call import Call
from dit_accel.plan.context import CallContext
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.plan import AttentionPlan
from dit_accel.rules.ultravico import DecayRule
from dit_accel.testing.recording import recorded
from dit_accel.testing.reference import attention, tile_states

LAYOUT = TokenLayout(frames=7, height=3, width=5, text_before=4, text_after=9)
FAMILY = Family(
    name="some", repo="", layers=1, heads=2, head_dim=8, ffn_dim=8, patch=(1, 2, 2), vae=(4, 8), height=16, width=16,
    num_frames=9, trained_frames=3,
)  # fmt: skip
ACTIVE = UltraViCo(alpha=0.5, beta=0.2, period=3, gamma=0.5, trained_frames=2, first_frame=True)


context = functools.partial(context_of, LAYOUT, step_index=2)
call_of = functools.partial(random_call, LAYOUT)


def on(config: UltraViCo, adapter: Adapter, family: Family | None) -> UltraViCoHandler:
    return UltraViCoHandler(config, Model(adapter=adapter, family=family, heads=2, layers=3))


def handler(config: UltraViCo = ACTIVE, family: Family | None = FAMILY) -> UltraViCoHandler:
    return UltraViCoHandler(config, dataclasses.replace(MODEL, family=family))


# Config


def test_what_the_model_must_tell_is_asked_for():
    with pytest.raises(ConfigError, match=r"ultravico.*length.*any, .*sizes"):
        on(UltraViCo(), ADAPTER, None)
    unknown = dataclasses.replace(FAMILY, trained_frames=None)
    with pytest.raises(ConfigError, match=r"ultravico.*length.*some .*ultravico\.trained_frames"):
        on(UltraViCo(), ADAPTER, unknown)
    assert on(UltraViCo(trained_frames=5), ADAPTER, unknown).settings.trained_frames == 5
    with pytest.raises(ConfigError, match=r"ultravico\.gamma = 4.*ultravico\.period"):
        on(UltraViCo(gamma=4), ADAPTER, FAMILY)
    with pytest.raises(ConfigError, match=r"ultravico\.beta = 0\.6.*bands"):
        on(UltraViCo(beta=0.6), ADAPTER, FAMILY)
    with pytest.raises(ConfigError, match=r"ultravico\.period = 9.*ultravico\.gamma"):
        on(UltraViCo(period=9), ADAPTER, FAMILY)


def test_recipes_fill_what_is_unset():
    recipe = {"period": 6.0, "gamma": 1.0, "first_frame": True, "by_ratio": ((2.0, 0.95, 0.7), (4.0, 0.9, None))}
    family = dataclasses.replace(FAMILY, recipes={"ultravico": recipe})
    assert on(UltraViCo(), ADAPTER, family).rule(6) == DecayRule(
        trained_frames=3, alpha=0.95, beta=0.7, period=6.0, gamma=1.0
    )
    assert on(UltraViCo(), ADAPTER, family).rule(12).beta == 0.6  # none is published: the safe one
    assert on(UltraViCo(alpha=0.5), ADAPTER, family).rule(6).beta == 0.5  # never above alpha
    assert on(UltraViCo(beta=0.3), ADAPTER, family).rule(6).beta == 0.3
    with pytest.raises(ConfigError, match=r"ultravico\.beta.*beta = 0\.99 and alpha = 0\.95"):
        on(UltraViCo(beta=0.99), ADAPTER, family).rule(6)
    assert on(UltraViCo(), ADAPTER, family).settings.first_frame
    assert on(UltraViCo(first_frame=False), ADAPTER, family).settings.first_frame is False
    assert on(UltraViCo(), ADAPTER, FAMILY).rule(6) == DecayRule(trained_frames=3, alpha=0.9)
    wrong = dataclasses.replace(FAMILY, recipes={"ultravico": {"alhpa": 0.5}})
    with pytest.raises(ConfigError, match=r"recipe.*ultravico.*'alhpa'"):
        on(UltraViCo(), ADAPTER, wrong)


def test_it_says_what_it_does_to_a_length():
    def said(frames: int, config: UltraViCo = ACTIVE) -> str:
        return on(config, ADAPTER, FAMILY).check_layout(dataclasses.replace(LAYOUT, frames=frames))

    plain = UltraViCo()
    assert said(3, plain) == "ultravico changes nothing: 3 latent frames, trained on 3 (9 output frames)"
    assert said(7, plain) == (
        "ultravico: 7 latent frames, 2.33 times the trained 3 (9 output frames); alpha 0.9 beyond 1 frames; decay "
        "saves no work and is counted as none"
    )
    assert "trained 2 (5 output frames); alpha 0.5 beyond 1 frames, beta 0.2 within 0.5 of multiples of 3;" in said(7)


# The plan


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


def test_centring_has_its_gradient():
    for mask in (None, torch.rand(2, LAYOUT.tokens) < 0.7):
        for form in ("bshd", "bhsd"):
            call = call_of(form, mask=mask)
            call.k.requires_grad_()
            mean = mean_key(call)
            centred = call.k - mean
            if mask is not None:
                centred = centred * mask[:, None, :, None]
            grad = torch.randn_like(centred)
            (expected,) = torch.autograd.grad(centred, call.k, grad)
            if mask is not None:  # the kernels give masked keys none
                grad = grad * mask[:, None, :, None]
            found = AttentionPlan(key_mean=mean.detach()).gradient_before_centring(grad, call.key_mask())
            torch.testing.assert_close(found, expected)


def test_it_applies_beyond_the_trained_length_and_where_anything_changes():
    def applies(config: UltraViCo, frames: int = 7) -> bool:
        return handler(config).applies(dataclasses.replace(LAYOUT, frames=frames))

    assert applies(UltraViCo())
    assert not applies(UltraViCo(), 3)
    assert not applies(UltraViCo(trained_frames=7))
    assert not applies(UltraViCo(alpha=1.0))
    assert applies(UltraViCo(alpha=1.0, beta=0.9, period=4, gamma=1))
    assert applies(UltraViCo(alpha=1.0, first_frame=True))


# What it computes


def by_hand(plan: AttentionPlan, q, k, v, layout: TokenLayout, config: UltraViCo, rule: DecayRule) -> torch.Tensor:
    """The paper's formula over pairs of tokens, [B, H, S, D] in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    if config.center_keys:
        k = k - k.mean(2, keepdim=True)
    x = q @ k.mT * q.shape[-1] ** -0.5
    for i in range(layout.tokens):
        for j in range(layout.tokens):
            a, b = ((n - layout.text_before) // layout.tokens_per_frame for n in (i, j))
            if not (0 <= a < layout.frames and 0 <= b < layout.frames):
                continue
            distance = abs(a - b)
            if distance > rule.trained_frames / 2:
                bands = [m * rule.period for m in range(1, 9)] if rule.beta else []
                factor = rule.beta if any(abs(distance - band) <= rule.gamma for band in bands) else rule.alpha
                x[..., i, j] = torch.where(x[..., i, j] > 0, factor * x[..., i, j], x[..., i, j])
            if config.first_frame and a == 0 and b >= rule.trained_frames:
                x[..., i, j] = -torch.inf
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
    expected = by_hand(call.plan, call.q, call.k, call.v, layout, config, rule)  # centring twice changes nothing
    torch.testing.assert_close(call.out, expected)


def test_length_after_length_generation_after_generation_and_none_after_detach():
    transformer = tiny_transformer()
    short, long = run(transformer, frames=2), run(transformer, frames=6)
    with dit_accel.attach(transformer, ACTIVE) as attachment:
        first = run(transformer, frames=6)
        report = attachment.report()
        assert not torch.equal(first, long)
        assert [(step.dense_layers, step.sparse_layers) for step in report.steps] == [(0, 3)] * 6
        assert report.methods["ultravico"]["trained_frames"] == 2
        assert "alpha 0.5 beyond 1 frames, beta 0.2 within 0.5 of multiples of 3" in str(report)
        assert torch.equal(run(transformer, frames=2), short)
        assert [(step.dense_layers, step.sparse_layers) for step in attachment.report().steps] == [(3, 0)] * 6
        with pytest.warns(UnplannedRun, match=r"ultravico.*nothing: 2 lat"):
            other = run(transformer, frames=7)
        assert torch.equal(run(transformer, frames=6), first)
        assert torch.equal(run(transformer, frames=7), other)
    assert torch.equal(run(transformer, frames=6), long)
    assert dit_accel.attachment_of(transformer) is None


# With gradients, compiled, and with other methods


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


RADIAL = RadialAttention(block_size=16, decay_factor=0.2, near="half", sink=False, dense_steps=0, dense_layers=0)
LITE = LiteAttention(block_size=16, dense_steps=0, criterion="mass", threshold=0.21)


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


def test_methods_that_look_at_keys_see_the_centred_ones(monkeypatch):
    from dit_accel.methods.attention.lite.handler import LiteHandler

    seen, plan_of = [], LiteHandler.plan

    def looking(self, plan, call, context):
        seen.append((plan, call))
        return plan_of(self, plan, call, context)

    monkeypatch.setattr(LiteHandler, "plan", looking)
    transformer = tiny_transformer()
    with dit_accel.attach(transformer, LITE, ACTIVE):
        run(transformer, steps=1, branches=("cond",))
    assert len(seen) == 3
    for plan, call in seen:
        assert plan.frame_decay is not None
        assert call.k.mean(2).abs().max() < 1e-6


def test_models_without_frames_or_a_known_length_refuse_it():
    model = tiny_models.FLUX[0]
    flux = model.transformer(**model.config)
    with pytest.raises(ConfigError, match=r"ultravico.*flux.*image"):
        dit_accel.attach(flux, UltraViCo(trained_frames=2))
    transformer = tiny_transformer()
    with pytest.raises(ConfigError, match=r"ultravico.*length.*wan, .*sizes"):
        dit_accel.attach(transformer, UltraViCo())
    (described,) = dit_accel.describe(transformer).transformers
    assert described.needs["ultravico"] == "trained_frames"
    assert "ultravico" not in {**described.methods, **described.refused}


class _Decays(MethodConfig):
    name = "decays"


class _Decaying(AttentionHandler):
    """Another method with a decay of its own."""

    config_type = _Decays
    phase = Phase.LISTS

    def plan(self, plan: AttentionPlan, call: Call, context: CallContext) -> AttentionPlan:
        return plan.decay(frame_decay(DecayRule(trained_frames=1, alpha=0.5), context.layout, "cpu"))


def test_two_methods_that_decay_are_refused_at_the_first_call(monkeypatch):
    transformer = tiny_transformer()
    monkeypatch.setitem(registry.handlers(), "decays", _Decaying)
    with (
        dit_accel.attach(transformer, ACTIVE, _Decays()),
        pytest.raises(ConfigError, match=r"^ultravico.*decays.*frame decay"),
    ):
        run(transformer)


def test_two_methods_that_say_so_are_refused_before(monkeypatch):
    transformer = tiny_transformer()
    monkeypatch.setattr(_Decaying, "exclusive", frozenset({"frame decay"}))
    monkeypatch.setitem(registry.handlers(), "decays", _Decaying)
    for methods in ((ACTIVE, _Decays()), (_Decays(), ACTIVE)):
        with pytest.raises(ConfigError, match=r"^decays.*ultravico.*frame decay"):
            dit_accel.attach(transformer, *methods, preset="none")
    assert dit_accel.attachment_of(transformer) is None
