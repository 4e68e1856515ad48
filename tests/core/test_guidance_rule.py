"""Guidance by a perturbed prediction: when it acts, what it adds, of which heads, and what stands in their place."""

import pytest
import torch
import torch.nn.functional as F

from dit_accel import NAG, SEG, ConfigError, SoftPAG
from dit_accel.adapters.installed import adapter_for
from dit_accel.methods.base import Model
from dit_accel.methods.compose import make_handlers
from dit_accel.methods.guidance.head_specs import Stacks, first_layer, read_heads, split_specs
from dit_accel.methods.guidance.targets import (
    OtherOutput,
    blur,
    blurred_queries,
    mean_values,
    of_mean_query,
    put_in_place,
)
from dit_accel.plan.call import Call
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.plan import AttentionPlan
from dit_accel.rules.guidance import added, normalized


def test_what_is_added():
    cond, perturbed = torch.randn(2, 2, 3, 5)
    assert torch.equal(added(cond, cond, 5.0), torch.zeros(2, 3, 5))
    assert torch.equal(added(cond, perturbed, 2.0), 2 * (cond - perturbed))
    assert added(cond.bfloat16(), perturbed.bfloat16(), 2.0).dtype == torch.float32
    assert added(cond.double(), perturbed.double(), 2.0).dtype == torch.float64


def test_rescaling_gives_the_conditional_deviation_back():
    cond, perturbed = torch.randn(2, 2, 300)
    whole = cond + 4.0 * (cond - perturbed)
    for phi in (0.0, 0.7, 1.0):
        made = cond + added(cond, perturbed, 4.0, phi)
        expected = phi * whole * (cond.std(1, keepdim=True) / whole.std(1, keepdim=True)) + (1 - phi) * whole
        torch.testing.assert_close(made, expected)


def test_normalized_is_the_formula_and_leaves_zeros_alone():
    for scale, tau, alpha in ((11.0, 1.5, 1.0), (11.0, 1.5, 0.7), (1.2, 1e9, 0.25), (1.0, 1.0, 0.7)):
        positive, negative = torch.randn(2, 3, 5, 8, dtype=torch.float64)
        positive[0, 0] = 0
        assert normalized(positive.bfloat16(), negative.bfloat16(), scale, tau, alpha).dtype == torch.float32
        led = normalized(positive, negative, scale, tau, alpha)
        for z, minus, out in zip(positive.flatten(0, 1), negative.flatten(0, 1), led.flatten(0, 1), strict=True):
            guided = scale * z - (scale - 1) * minus
            longest = tau * z.abs().sum()
            guided = guided * min(1.0, float(longest / guided.abs().sum())) if longest else z
            torch.testing.assert_close(out, alpha * guided + (1 - alpha) * z)


LAYOUT = TokenLayout(frames=2, height=3, width=4, text_before=1, text_after=2)


@pytest.fixture
def call():
    torch.manual_seed(0)
    q = torch.randn(2, 4, LAYOUT.tokens, 8)
    k, v = torch.randn(2, 2, 2, LAYOUT.tokens, 8)
    mask = torch.ones(2, 1, 1, LAYOUT.tokens, dtype=torch.bool)
    mask[1, ..., -1] = False
    return Call(q=q, k=k, v=v, mask=mask)


def attention(q, call):
    k, v = (x.double().repeat_interleave(2, 1) for x in (call.k, call.v))
    logits = q.double() @ k.transpose(2, 3) / 8**0.5
    return torch.softmax(logits.masked_fill(~call.mask, -torch.inf), -1) @ v


def test_targets_are_the_mean_of_the_valid_values_and_the_mean_query_of_all_or_of_the_picture(call):
    image = torch.zeros(LAYOUT.tokens, dtype=torch.bool)
    image[LAYOUT.visual] = True
    valid = torch.stack([call.q[0].mean(1, keepdim=True), call.q[1, :, :-1].mean(1, keepdim=True)])
    for made, query in (
        (mean_values(call), torch.zeros_like(call.q[:, :, :1])),
        (of_mean_query(call, image), call.q[:, :, LAYOUT.visual].mean(2, keepdim=True)),
        (of_mean_query(call, None), valid),
    ):
        torch.testing.assert_close(made.double(), attention(query, call), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("side", "sigma", "length"), [(9, 0.4, 3), (9, 1.0, 7), (9, 1.3, 9), (5, 3.0, 9), (1, 2.0, 1)])
def test_the_blur_is_a_gaussian_mirrored_at_the_ends(side, sigma, length):
    offsets = torch.arange(length) - length // 2
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    values = torch.randn(1, 1, side)
    padded = F.pad(values, (length // 2, length // 2), mode="reflect") if length > 1 else values
    wanted = F.conv1d(padded, (kernel / kernel.sum())[None, None])
    torch.testing.assert_close(blur(side, sigma) @ values[0, 0], wanted[0, 0], rtol=1e-5, atol=1e-6)


def test_blurred_queries_lie_between_the_queries_and_each_frames_mean(call):
    grid = call.q[:, :, LAYOUT.visual].unflatten(2, (2, 3, 4)).movedim(5, 3)
    mean = grid.mean((4, 5), keepdim=True).expand_as(grid)
    for sigma, blurred in ((1e-3, grid), (1.0, blur(3, 1.0) @ grid @ blur(4, 1.0).T), (1e4, mean)):
        q = call.q.clone()
        q[:, :, LAYOUT.visual] = blurred.movedim(3, 5).flatten(2, 4)
        torch.testing.assert_close(blurred_queries(call, LAYOUT, sigma), q)


def test_a_share_of_some_heads_and_rows_is_replaced_and_nothing_else_moves(call):
    out, other = torch.randn(2, 2, 4, LAYOUT.tokens, 8)
    share, tokens = torch.tensor([0.0, 0.25, 1.0, 0.0]), torch.arange(LAYOUT.tokens) > 4
    changed = OtherOutput(other=other, share=share, tokens=tokens).applied(out)
    assert torch.equal(changed[:, [0, 3]], out[:, [0, 3]])
    assert torch.equal(changed[:, :, :5], out[:, :, :5])
    assert torch.equal(changed[:, 2, 5:], other[:, 2, 5:])
    torch.testing.assert_close(changed[:, 1, 5:], 0.75 * out[:, 1, 5:] + 0.25 * other[:, 1, 5:])
    rows = torch.tensor([2, 7, 9])
    some = OtherOutput(other=other, share=share, tokens=tokens).applied(out[:, :, rows], rows)
    assert torch.equal(some, changed[:, :, rows])
    mean = OtherOutput(other=other[:, :, :1], share=share).applied(out[:, :, rows], rows)
    assert torch.equal(mean[:, 2], other[:, 2, :1].expand(-1, 3, -1))


def test_a_layer_that_is_replaced_whole_computes_no_attention(call):
    share = torch.ones(4)
    assert put_in_place(AttentionPlan(), mean_values(call), share, whole=True).skips_logits
    assert not put_in_place(AttentionPlan(), mean_values(call), share).skips_logits


def test_it_and_a_negative_text_exclude_each_other():
    adapter = adapter_for("FluxTransformer2DModel")
    model = Model(adapter=adapter, family=None, heads=2, layers=4)
    with pytest.raises(ConfigError, match=r"^nag.*softpag.*last change"):
        make_handlers((SoftPAG(heads="L1", target="uniform"), NAG()), model)
    for config in (SEG(layers="L1"), SoftPAG(heads="L1")):
        assert len(make_handlers((config, NAG()), model)) == 2


NAMES = [f"transformer_blocks.{i}.attn" for i in range(3)] + [f"single_transformer_blocks.{i}.attn" for i in range(12)]
STACKS = Stacks(names=NAMES, heads=4, others={"transformer_blocks.0.cross", "refiner.attn"})
ALL = (0, 1, 2, 3)


def read(specs, **published):
    return read_heads(specs, STACKS, "softpag.heads", published)


def test_specs_name_heads():
    for specs, expected in (
        ("L3H1", {3: (1,)}),
        ("L3H1, L3H0", {3: (0, 1)}),
        (("L3H1", "L0"), {0: ALL, 3: (1,)}),
        ("L1", {1: ALL}),  # and none of 10 to 14
        ("L1-3", {1: ALL, 2: ALL, 3: ALL}),
        ("L1-L2H0-2", {1: (0, 1, 2), 2: (0, 1, 2)}),
        ("transformer_blocks", dict.fromkeys((0, 1, 2), ALL)),
        ("single_transformer_blocks.L0H3", {3: (3,)}),
        ("transformer_blocks.1.attn", {1: ALL}),
        ("golden", {2: (3,), 14: (0,)}),
        ("", {}),
        ((), {}),
    ):
        assert read(specs, golden=("L14H0", "L2H3")) == expected


def test_what_is_not_there_is_refused_with_the_counts():
    for specs, text in (
        ("L15", r"softpag\.heads 'L15'.*layers 0 to 14"),
        ("L2-1", "layers 0 to 14"),
        ("transformer_blocks.L3", r"transformer_blocks.*layers 0 to 2"),
        ("L1H4", r"15 attention layers.*heads 0 to 3"),
        ("blocks.L1", r"'blocks'.*transformer_blocks, single_transformer_blocks"),
        ("transformer_blocks.0.cross", r"\.cross.*cross-attention"),
        ("refiner.attn", r"refiner\.attn.*L0 to L14"),
        ("gold", r"'gold'.*L3H1 \(a head\).*'golden'"),
        ("3:1", r"'3:1'.*L3H1"),
        ("none.json", r"none\.json: No such file"),
    ):
        with pytest.raises(ConfigError, match=text):
            read(specs, golden=("L14H0",))


def test_files_hold_lists(tmp_path):
    path = tmp_path / "heads.json"
    for content in ('["L3H1", "L0"]', '{"heads": ["L3H1", "L0"], "objective": "sharpness"}'):
        path.write_text(content)
        assert read(str(path)) == {0: ALL, 3: (1,)}
    for content, text in (("[", "JSON"), ("{}", "got None"), ("[1]", r"got \[1\]"), (f'["{path}"]', r"got \[")):
        path.write_text(content)
        with pytest.raises(ConfigError, match=text):
            read(str(path))


def test_specs_without_a_model():
    assert first_layer("L5H1, L3", 12, 4) == 3
    assert first_layer("single_transformer_blocks", 12, 4) is None  # how many stand before it is not known
    assert split_specs(" L1 ,L2H3,") == ("L1", "L2H3")
