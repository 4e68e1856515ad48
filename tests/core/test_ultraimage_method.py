"""UltraImage: entropy in one pass, the factors of heads, its config, and what it does to models and runs."""

import dataclasses

import pytest
import tiny_models
import torch
from dit_accel_pipelines import ADAPTERS
from hypothesis import given
from hypothesis import strategies as st
from one_layer import MODEL, OneLayer, random_call
from wan_tiny import denoise, tiny_transformer

import dit_accel
from dit_accel import ConfigError, EasyCache, RoPE, UltraImage
from dit_accel.methods.positions.entropy import focus, token_entropy
from dit_accel.methods.positions.ultraimage import UltraImageHandler, _rows
from dit_accel.plan.layout import TokenLayout
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
    values=st.lists(st.floats(0, 12), min_size=1, max_size=20), least=st.floats(1, 1.5), more=st.floats(0, 1),
    power=st.floats(0.2, 5),
)  # fmt: skip
def test_factors_fall_with_entropy_between_their_bounds(values, least, more, power):
    entropy = torch.tensor(sorted(values), dtype=torch.float64)
    found = focus(entropy, entropy.min(), entropy.max(), least, least + more, power)
    assert bool(found.isfinite().all())
    assert bool((found >= least - 1e-9).all() & (found <= least + more + 1e-9).all())
    assert bool((found.diff() <= 1e-12).all())
    if entropy.min() == entropy.max():
        assert found.tolist() == [least] * len(values)
    else:
        assert float(found[0]) == pytest.approx(least + more)
        assert float(found[-1]) == pytest.approx(least)


def test_what_lies_outside_the_extremes_is_bounded():
    entropy, low, high = torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor(1.0), torch.tensor(2.0)
    assert focus(entropy, low, high, 1.0, 1.3, 2.0).tolist() == pytest.approx([1.3, 1.3, 1.0, 1.0])


def test_recipes_and_sizes_of_models():
    flux = BY_NAME["flux"]
    by_name = {family.name: family for family in flux.families}

    def settings(config, name):
        return UltraImageHandler(config, dataclasses.replace(MODEL, adapter=flux, family=by_name[name])).settings

    assert settings(UltraImage(), "flux.1-dev").indices == (9,)
    assert (settings(UltraImage(), "flux.1-dev").focus_min, settings(UltraImage(), "flux.1-dev").turn) == (1.1, 0.85)
    assert settings(UltraImage(), "flux-tiny").focus_min == 1.0
    with pytest.raises(ConfigError, match=r"focus_min = 1\.1 and focus_max = 1\.05"):
        settings(UltraImage(focus_max=1.05), "flux.1-dev")
    with pytest.raises(ConfigError, match=r"ultraimage.*size.*trained_height, ult"):
        UltraImageHandler(UltraImage(), MODEL)
    with pytest.raises(ConfigError, match=r"pictures.*ultraimage\.trained_width"):
        UltraImageHandler(UltraImage(trained_height=3), MODEL)


def run_heads(layer, call, steps, branch="cond"):
    return [layer.call(call.q, call.k, call.v, LAYOUT, step=step, branch=branch) for step in steps]


def test_the_first_step_measures_and_later_ones_concentrate():
    torch.manual_seed(0)
    call = random_call(LAYOUT)
    layer = OneLayer(HEADS)
    out = run_heads(layer, call, [0, 1, 1, 2])
    plain = torch.nn.functional.scaled_dot_product_attention(call.q, call.k, call.v)
    torch.testing.assert_close(out[0].transpose(1, 2) if out[0].shape != plain.shape else out[0], plain)
    assert torch.equal(out[1], out[2])
    assert torch.equal(out[1], out[3])
    assert not torch.equal(out[0], out[1])
    assert layer.attended == 4  # all of them the model's own attention
    rows = _rows(LAYOUT, 16, "cpu")
    entropy = direct(call.q[:, :, rows], call.k, 8**-0.5)
    factors = focus(entropy, *(f(entropy, 1, keepdim=True) for f in (torch.amin, torch.amax)), 1.0, 1.3, 2.0).float()
    expected = torch.nn.functional.scaled_dot_product_attention(call.q * factors[..., None, None], call.k, call.v)
    torch.testing.assert_close(out[1], expected)


def test_branches_are_measured_apart():
    torch.manual_seed(0)
    one, other = random_call(LAYOUT, sharp=1.0), random_call(LAYOUT, sharp=5.0)
    layer = OneLayer(HEADS)
    alone = OneLayer(HEADS)
    expected = run_heads(alone, other, [0, 1], "uncond")
    for step in (0, 1):
        run_heads(layer, one, [step], "cond")
        found = run_heads(layer, other, [step], "uncond")[0]
    assert torch.equal(found, expected[1])
    (handler,) = layer.engine.handlers
    held = {key[1]: heads.factors[0] for key, heads in handler._heads.items()}
    assert set(held) == {"cond", "uncond"}
    assert handler.state_bytes() <= 2 * 2 * 2 * (8 + 4)  # branches x rows x heads x (entropy, factor)
    assert len(handler.report().lines) == 2


def test_a_run_is_told_of_its_own_branches_alone():
    transformer = tiny_transformer()
    with dit_accel.attach(transformer, HEADS) as attachment:
        denoise(transformer, 3)
        assert set(attachment.report().section("ultraimage").data) == {"transformer cond", "transformer uncond"}
        denoise(transformer, 3, branches=("cond",))
        assert set(attachment.report().section("ultraimage").data) == {"transformer cond"}


def test_what_is_planned_to_be_held_is_held():
    """Two float32 numbers a head, layer and branch."""
    wan = BY_NAME["wan"]
    family = dataclasses.replace(wan.families[0], layers=3, heads=2, forwards_per_step=2)
    handler = UltraImageHandler(HEADS, dataclasses.replace(MODEL, adapter=wan, family=family, heads=2, layers=3))
    transformer = tiny_transformer()
    with dit_accel.attach(transformer, HEADS) as attachment:
        denoise(transformer, 3)
        held = attachment.report().state_bytes["ultraimage"]
    planned = [
        handler.estimate(TokenLayout(frames=5, height=4, width=width), steps) for width, steps in ((4, 3), (4, 1))
    ]
    assert planned[0].carried_bytes == held == 3 * 2 * 8 * 2
    assert planned[1].carried_bytes == 0
    assert handler.estimate(TokenLayout(frames=5, height=2, width=2), 3).carried_bytes == 0
    one = dataclasses.replace(family, forwards_per_step=1)
    for known in (one, None):
        alone = UltraImageHandler(HEADS, dataclasses.replace(handler.model, family=known))
        assert alone.estimate(LAYOUT, 3).carried_bytes == 3 * 2 * 8


def test_options_at_their_bounds():
    for options in (
        dict(focus_min=1.0),
        dict(focus_max=1.0),
        dict(power=1e-9),
        dict(rows=1),
        dict(turn=1.0),
        dict(trained_height=1),
        dict(trained_width=1),
        dict(focus_min=1.2, focus_max=1.2),
        dict(indices=(0,)),
    ):
        (name,) = [*options][-1:]
        assert getattr(UltraImage(**options), name) == options[name]


@pytest.mark.parametrize(("height", "width", "applies"), [(2, 2, False), (3, 2, True), (2, 3, True), (1, 9, True)])
def test_it_applies_beyond_the_trained_size_along_any_side(height, width, applies):
    handler = UltraImageHandler(HEADS, MODEL)
    layout = TokenLayout(frames=1, height=height, width=width)
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
    model = tiny_models.MODELS[name][0]
    case = Case(BY_NAME[name], model)
    inputs = case.inputs(1)
    plain = case.run(inputs)
    with dit_accel.attach(case.transformer, UltraImage(indices=(0,), **SIZE)):
        first = case.run(inputs)  # heads are not changed yet
        case.run(inputs, 1)
    axes = ("height", "width")
    with dit_accel.attach(case.transformer, RoPE(kind="ultraimage", axes=axes, indices=(0,), **SIZE)):
        expected = case.run(inputs)
    assert torch.equal(first, expected)
    assert not torch.equal(first, plain)
    assert torch.equal(case.run(inputs), plain)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sd3", {}, r"sd3.*ultraimage\.correct = false"),
        ("mochi", {}, r"'ultraimage'.*mochi"),
        ("hunyuan-dit", {}, r"along height.*ultraimage\.correct = false"),
    ],
)
def test_honest_limits(name, options, message):
    case = Case(BY_NAME[name], tiny_models.MODELS[name][0])
    with pytest.raises(ConfigError, match=message):
        dit_accel.attach(case.transformer, UltraImage(**SIZE, **options))
    assert dit_accel.attachment_of(case.transformer) is None
    inputs, config = case.inputs(1), dataclasses.replace(HEADS, focus_max=2.0)
    plain = case.run(inputs, 1)
    with dit_accel.attach(case.transformer, config):
        assert not torch.equal(case.run_after(1, inputs), plain)
    assert torch.equal(case.run(inputs, 1), plain)


def test_positions_are_changed_by_one_method():
    transformer = tiny_transformer()
    positions = RoPE(kind="pi", **SIZE)
    with pytest.raises(ConfigError, match=r"^ultraimage.*rope.*correct = false"):
        dit_accel.attach(transformer, UltraImage(**SIZE), positions)
    with dit_accel.attach(transformer, HEADS, positions):
        denoise(transformer, 2)
