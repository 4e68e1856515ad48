"""UltraImage: entropy in one pass, the factors of heads, its config, and what it does to models and runs."""

import dataclasses

import pytest
import tiny_models
import torch
from dit_accel_pipelines import ADAPTERS
from hypothesis import given, settings
from hypothesis import strategies as st
from one_layer import MODEL, OneLayer, layout_of, random_call
from wan_tiny import denoise, tiny_transformer

import dit_accel
from dit_accel import ConfigError, EasyCache, RoPE, UltraImage
from dit_accel.methods.positions.entropy import focus, token_entropy
from dit_accel.methods.positions.ultraimage import UltraImageHandler, _rows
from dit_accel.plan.layout import TokenLayout
from dit_accel.testing.recording import recorded
from dit_accel.testing.tiny_models import Case

BY_NAME = {adapter.name: adapter for adapter in ADAPTERS}
LAYOUT = TokenLayout(frames=1, height=6, width=5, text_before=4, text_after=3)
SIZE = dict(trained_height=2, trained_width=2)
HEADS = UltraImage(correct=False, rows=16, **SIZE)


def direct(q, k, scale, mask=None):
    logits = (q @ k.mT) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None], -torch.inf)
    p = logits.softmax(-1)
    return -torch.special.xlogy(p, p).sum(-1).mean(-1)


@given(
    seed=st.integers(0, 99), keys=st.integers(1, 70), at_once=st.integers(1, 80), sharp=st.floats(0.0, 30.0),
    masked=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_one_pass_is_the_definition(seed, keys, at_once, sharp, masked):
    torch.manual_seed(seed)
    q, k = sharp * torch.randn(2, 4, 5, 8, dtype=torch.float64), torch.randn(2, 2, keys, 8, dtype=torch.float64)
    mask = None
    if masked:
        mask = torch.rand(2, keys) < 0.5
        mask[:, -1] = True  # the first keys of a chunk may all be hidden
    found = token_entropy(q, k, mask=mask, keys_at_once=at_once)
    assert found.shape == (2, 4)
    torch.testing.assert_close(found, direct(q, k.repeat_interleave(2, 1), 8**-0.5, mask), atol=1e-10, rtol=1e-10)


def test_known_entropies():
    q, k = torch.zeros(1, 1, 3, 4), torch.randn(1, 1, 50, 4)
    assert float(token_entropy(q, k)) == pytest.approx(torch.tensor(50.0).log().item(), abs=1e-5)  # uniform: ln N
    one = torch.eye(4, dtype=torch.float64)[None, None]
    assert float(token_entropy(one, one, scale=1e4)) == pytest.approx(0, abs=1e-12)
    half = token_entropy(q.bfloat16(), k.bfloat16())
    assert half.dtype == torch.float32


@given(
    values=st.lists(st.floats(0, 12), min_size=1, max_size=20), ends=st.tuples(st.floats(0, 12), st.floats(0, 12)),
    least=st.floats(1, 1.5), more=st.floats(0, 1), power=st.floats(0.2, 5),
)  # fmt: skip
def test_factors_fall_with_entropy_between_their_bounds(values, ends, least, more, power):
    """What lies outside the extremes is bounded; where these are alike, every factor is the least."""
    low, high = sorted(ends)
    wide = torch.tensor([*values, low, high], dtype=torch.float64)
    made = focus(wide[:-2], wide[-2], wide[-1], least, least + more, power)
    for entropy, factor in zip(values, made.tolist(), strict=True):
        z = min(1.0, max(0.0, (high - entropy) / (high - low))) if high > low else 0.0
        assert factor == pytest.approx(least + more * z**power)


def test_recipes_and_sizes_of_models():
    flux = BY_NAME["flux"]
    by_name = {family.name: family for family in flux.families}

    def settings(name, **options):
        model = dataclasses.replace(MODEL, adapter=flux, family=by_name[name])
        return UltraImageHandler(UltraImage(**options), model).settings

    flux_dev = settings("flux.1-dev")
    assert (flux_dev.indices, flux_dev.focus_min, flux_dev.turn) == ((9,), 1.1, 0.85)
    assert settings("flux-tiny").focus_min == 1.0
    with pytest.raises(ConfigError, match=r"focus_min = 1\.1 and focus_max = 1\.05"):
        settings("flux.1-dev", focus_max=1.05)
    with pytest.raises(ConfigError, match=r"ultraimage.*size.*trained_height, ult"):
        UltraImageHandler(UltraImage(), MODEL)
    with pytest.raises(ConfigError, match=r"pictures.*ultraimage\.trained_width"):
        UltraImageHandler(UltraImage(trained_height=3), MODEL)


def test_the_first_step_measures_and_later_ones_concentrate():
    call, layer = random_call(LAYOUT, "bhsd"), OneLayer(HEADS)
    out = [layer.call(call.q, call.k, call.v, LAYOUT, step=step) for step in (0, 1, 1, 2)]
    torch.testing.assert_close(out[0], torch.nn.functional.scaled_dot_product_attention(call.q, call.k, call.v))
    assert torch.equal(out[1], out[2])
    assert torch.equal(out[1], out[3])
    assert layer.attended == 4  # all of them the model's own attention
    entropy = direct(call.q[:, :, _rows(LAYOUT, 16, "cpu")], call.k, 8**-0.5)
    factors = focus(entropy, entropy.amin(1, keepdim=True), entropy.amax(1, keepdim=True), 1.0, 1.3, 2.0).float()
    expected = torch.nn.functional.scaled_dot_product_attention(call.q * factors[..., None, None], call.k, call.v)
    torch.testing.assert_close(out[1], expected)
    assert not torch.equal(out[0], out[1])


def test_the_heads_of_all_layers_are_compared_in_each_branch_by_itself():
    transformer, factors = tiny_transformer(), []
    with dit_accel.attach(transformer, HEADS) as attachment, recorded(attachment) as calls:
        denoise(transformer, 2)
    for branch in ("cond", "uncond"):
        first, second = ([c for c in calls if (c.context.branch, c.context.step_index) == (branch, i)] for i in (0, 1))
        rows = _rows(first[0].context.layout, 16, "cpu")
        entropy = torch.stack([direct(call.q[:, :, rows], call.k, call.q.shape[-1] ** -0.5) for call in first])
        factors.append(torch.stack([call.plan.head_scale for call in second]))
        torch.testing.assert_close(factors[-1], focus(entropy, entropy.min(), entropy.max(), 1.0, 1.3, 2.0))
    assert (factors[0] - factors[1]).abs().max() > 1e-4


def test_two_float32_numbers_a_head_layer_and_branch_are_planned_to_be_held():
    wan = BY_NAME["wan"]
    family = dataclasses.replace(wan.families[0], forwards_per_step=2)
    for known, size, steps, held in (
        (family, (5, 4, 4), 3, 3 * 2 * 8 * 2),
        (dataclasses.replace(family, forwards_per_step=1), (5, 4, 4), 3, 3 * 2 * 8),
        (None, (5, 4, 4), 3, 3 * 2 * 8),
        (family, (5, 4, 4), 1, 0),
        (family, (5, 2, 2), 3, 0),  # the trained size
    ):
        handler = UltraImageHandler(HEADS, dataclasses.replace(MODEL, adapter=wan, family=known, layers=3))
        assert handler.estimate(layout_of(size), steps).carried_bytes == held


@pytest.mark.parametrize(("height", "width", "applies"), [(2, 2, False), (3, 2, True), (2, 3, True), (1, 9, True)])
def test_it_applies_beyond_the_trained_size_along_any_side(height, width, applies):
    handler, layout = UltraImageHandler(HEADS, MODEL), layout_of((1, height, width))
    assert handler.applies(layout) == applies
    assert ("changes nothing" in handler.check_layout(layout)) != applies


def test_rows_lie_in_the_picture_at_even_distances():
    rows = _rows(LAYOUT, 4, "cpu").tolist()
    assert rows[0] == 4
    assert rows[-1] == 4 + 29
    assert len(_rows(LAYOUT, 1000, "cpu")) == 30


def test_caches_wait_until_heads_are_measured():
    transformer = tiny_transformer()
    with dit_accel.attach(transformer, HEADS, EasyCache(threshold=100.0, warmup_steps=0)) as attachment:
        denoise(transformer, 4)
        assert {key[1] for key in attachment.engine.handlers[0]._heads} == {"cond", "uncond"}


@pytest.mark.parametrize("name", ["flux", "qwen-image", "z-image", "wan"])
def test_the_correction_is_that_of_rope(name):
    case, rope = Case(BY_NAME[name], tiny_models.MODELS[name][0]), RoPE(kind="ultraimage", axes=("height", "width"))
    inputs, outs = case.inputs(1), []
    for method in (UltraImage(indices=(0,), **SIZE), dataclasses.replace(rope, indices=(0,), **SIZE)):
        with dit_accel.attach(case.transformer, method):
            outs.append(case.run(inputs))  # in the first step heads are not changed yet
    assert torch.equal(*outs)
    assert not torch.equal(case.run(inputs), outs[0])


def test_honest_limits():
    for name, message in (
        ("sd3", r"sd3.*ultraimage\.correct = false"),
        ("mochi", r"'ultraimage'.*mochi"),
        ("hunyuan-dit", r"along height.*ultraimage\.correct = false"),
    ):
        case = Case(BY_NAME[name], tiny_models.MODELS[name][0])
        with pytest.raises(ConfigError, match=message):
            dit_accel.attach(case.transformer, UltraImage(**SIZE))
        inputs = case.inputs(1)
        plain = case.run(inputs, 1)
        with dit_accel.attach(case.transformer, dataclasses.replace(HEADS, focus_max=2.0)):
            assert not torch.equal(case.run_after(1, inputs), plain)


def test_positions_are_changed_by_one_method():
    transformer = tiny_transformer()
    positions = RoPE(kind="pi", **SIZE)
    with pytest.raises(ConfigError, match=r"^ultraimage.*rope.*correct = false"):
        dit_accel.attach(transformer, UltraImage(**SIZE), positions)
    with dit_accel.attach(transformer, HEADS, positions):
        denoise(transformer, 2)
