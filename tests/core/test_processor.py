"""The processor's replaced call, on diffusers' own processors of both kinds, and the masks it takes."""

import inspect
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from one_layer import MODEL, OneLayer
from tiny_models import MODELS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from wan_tiny import RADIAL

import dit_accel
from dit_accel import ConfigError
from dit_accel.attachment import processor as module
from dit_accel.attachment.forward_state import as_tensors
from dit_accel.attachment.op import NO_TICKET, planned_attention
from dit_accel.attachment.processor import dense_attention_of, stand_in, unwrap_processor, wrap_processor
from dit_accel.attachment.shards import SequenceShards
from dit_accel.methods.attention.radial import RadialAttention
from dit_accel.methods.base import AttentionHandler, Phase
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.tiling import Tiling

GRID = (3, 2, 2, 0, 0)


class Everything(AttentionHandler):
    """A method that plans every tile as exact, so that our kernels run what dense attention computes."""

    config_type = RadialAttention
    phase = Phase.LISTS

    def plan(self, plan, call, context):
        return plan.with_tiles(*self.model.tiling.full(context.layout, context.device))


@pytest.fixture
def one():
    layer = OneLayer(Everything(RadialAttention(), replace(MODEL, tiling=Tiling(4))), tokens_first=True)
    layer.engine.begin_forward(layer.denoising.context(layer.state), None, 2)
    return layer


def tensors():
    torch.manual_seed(0)
    return [torch.randn(2, 12, 2, 8) for _ in range(3)]


def arguments(number, q, k, v, differentiate=False):
    return q, k, v, None, torch.tensor(0), as_tensors(GRID), number, True, None, differentiate


def test_a_legacy_processor_keeps_its_face_and_its_result(one):
    processor = CogVideoXAttnProcessor2_0()
    wrapped = wrap_processor(processor, 0, {}, one.engine)
    assert isinstance(wrapped, CogVideoXAttnProcessor2_0)
    assert inspect.signature(wrapped.__call__) == inspect.signature(processor.__call__)
    torch.manual_seed(0)
    attn = Attention(query_dim=32, heads=2, dim_head=16, processor=processor).eval()
    hidden, text = torch.randn(2, 12, 32), torch.randn(2, 3, 32)
    with torch.no_grad():
        plain = attn(hidden, encoder_hidden_states=text)
        attn.set_processor(wrapped)
        assert all(torch.equal(a, b) for a, b in zip(attn(hidden, encoder_hidden_states=text), plain, strict=True))
        wrapped._dit_accel_sparse = True
        one.engine.forward.lay((3, 2, 2, 3, 0))
        planned = attn(hidden, encoder_hidden_states=text)
        assert one.engine.recorder.backends == {"reference"}
    for ours, theirs in zip(planned, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("original", [WanAttnProcessor(), CogVideoXAttnProcessor2_0()])
def test_the_models_own_attention_is_at_hand_and_what_is_set_later_is_shared_back(one, original):
    wrapped = wrap_processor(original, 0, {}, one.engine)
    dense, tokens_first = dense_attention_of(wrapped)
    assert tokens_first == isinstance(original, WanAttnProcessor)
    for key_heads in (4, 2):
        q, k, v = (torch.randn(2, heads, 12, 8) for heads in (4, key_heads, key_heads))
        out = dense(*((x.transpose(1, 2) for x in (q, k, v)) if tokens_first else (q, k, v)), None, 0.3)
        expected = F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=key_heads < 4)
        assert torch.equal(out.transpose(1, 2) if tokens_first else out, expected)
    wrapped._attention_backend = "native"
    assert unwrap_processor(wrapped, original) is original
    assert vars(original).pop("_attention_backend") == "native"


def test_key_padding_is_followed_and_other_masks_and_lengths_are_refused(one):
    (q, k, v), layout = tensors(), TokenLayout(frames=3, height=2, width=2)
    for shape in ((2, 12), (2, 1, 1, 12), (1, 1, 1, 12)):
        mask = torch.ones(shape, dtype=torch.bool)
        mask[..., 9:] = False
        expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask.reshape(-1, 1, 1, 12))
        out = one.call(q, k, v, layout, mask=mask)
        torch.testing.assert_close(out.transpose(1, 2), expected, rtol=1e-5, atol=1e-5)
    pairs = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
    with pytest.raises(ConfigError, match=r"torch.bool \[1, 1, 12, 12\].*pairs"):
        one.call(q, k, v, layout, mask=pairs)
    with pytest.raises(ConfigError, match=r"12 tokens.*'any'.*16"):
        one.call(q, k, v, TokenLayout(frames=4, height=2, width=2))


@pytest.fixture
def attend(one):
    """What stands in for diffusers' dispatch, in a layer that follows a plan."""
    one.engine.forward.processor = SimpleNamespace(
        _dit_accel_layer=torch.tensor(0), _dit_accel_sparse=True, _dit_accel_keys=None
    )
    one.engine.forward.lay(GRID)
    return stand_in(lambda *args, **call: pytest.fail("the model's own attention was called"), True, one.engine)


def test_what_a_plan_cannot_do_is_refused(attend):
    for options, match in (
        ({"dropout_p": 0.1}, r"dropout_p=0\.1"), ({"is_causal": True}, "is_causal=True"),
        ({"parallel_config": object()}, r"context parallelism.*compile_repeated_blocks"),
        ({"attn_mask": SimpleNamespace()}, "type SimpleNamespace"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=match):
            attend(*tensors(), **options)


class Halves(SequenceShards):
    """Two processes with half of the tokens each; the order of an exchange is turned around."""

    gather_call = staticmethod(lambda *own: [torch.cat([x, 2 * x], 1) for x in own])
    scatter = staticmethod(lambda x, heads: x[:, :6, :heads])
    gathered_mask = staticmethod(lambda mask: mask.flip(-1))


def test_a_plan_is_of_all_processes_tokens_and_the_model_s_own_call_has_its_mask_as_they_lie(one, attend):
    own, parallel, mask = [x[:, :6] for x in tensors()], {"parallel_config": object()}, torch.arange(12)[None] % 5 > 0
    shards = one.engine.forward.shards = Halves(group=None, rank=0, counts=(6, 6), gathered=None, positions=None)
    out, whole = attend(*own, mask, **parallel), (x.transpose(1, 2) for x in shards.gather_call(*own))
    expected = F.scaled_dot_product_attention(*whole, mask[:, None, None])[:, :, :6]
    torch.testing.assert_close(out.transpose(1, 2), expected, rtol=1e-5, atol=1e-5)
    one.engine.forward.processor._dit_accel_sparse = False
    dense = stand_in(lambda *_, attn_mask, **call: attn_mask, True, one.engine)
    assert torch.equal(dense(*own, mask, **parallel), mask.flip(-1))
    assert dense(*own, mask, parallel_config=None) is mask


def test_an_eager_call_goes_straight_to_the_plan_and_others_through_the_operator(one, attend, monkeypatch):
    through = []

    def operator(*given):
        through.append(given[-1])
        return planned_attention(*given)

    monkeypatch.setattr(module, "planned_attention", operator)
    q, k, v = tensors()
    out = attend(q, k, v)
    assert not through
    assert torch.equal(out, planned_attention(*arguments(one.engine.number, q, k, v))[0])
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        made = attend(*(fake.from_tensor(x) for x in (q, k, v)))
    assert (through, made.shape, type(made)) == ([False], out.shape, FakeTensor)
    assert torch.equal(attend(q.requires_grad_(), k, v), out)
    assert through == [False, True]


def test_the_operator_passes_opcheck_and_gives_a_ticket_with_and_without_a_backward(one):
    """Both outputs are tensors whatever follows: a graph of the transformer has them as its own."""
    q, k, v = (x.requires_grad_() for x in tensors())
    given = arguments(one.engine.number, q, k, v, differentiate=True)
    torch.library.opcheck(planned_attention, given, test_utils=("test_schema", "test_faketensor"))
    out, ticket = planned_attention(*given)
    torch.autograd.grad(out.sum(), (q, k, v))
    with torch.no_grad():
        _, none = planned_attention(*arguments(one.engine.number, q, k, v))
    assert ticket.dtype == none.dtype == torch.int64
    assert ticket.shape == none.shape == ()
    assert int(none) == NO_TICKET != int(ticket)
    with pytest.raises(RuntimeError, match="attachment 999999"):
        planned_attention(*arguments(999999, q, k, v))


def test_planned_calls_and_the_kernels_own_operators_stay_out_of_cuda_graphs():
    """A captured call would follow one step's plan for good, or read what was derived from lists that are gone."""
    for operators, name in ((torch.ops.dit_accel, "planned"), (torch.ops.dit_accel_kernels, "block_sparse")):
        for operator in (f"{name}_attention", f"{name}_attention_backward"):
            assert torch.Tag.cudagraph_unsafe in getattr(operators, operator).default.tags


def test_a_processor_kept_by_others_is_a_plain_one_after_detach():
    """diffusers keeps the processors that fused ones replace, and puts them back when told to."""
    tiny = MODELS["cogvideox"][1]
    model, inputs = tiny.transformer(**tiny.config).eval(), tiny.inputs(1)
    with torch.no_grad():
        plain = model(**inputs).sample
        attachment = dit_accel.attach(model, RADIAL)
        assert not torch.equal(model(**inputs).sample, plain)
        model.fuse_qkv_projections()
        attachment.detach()
        model.unfuse_qkv_projections()
        assert torch.equal(model(**inputs).sample, plain)
    assert all(type(processor) is CogVideoXAttnProcessor2_0 for processor in model.attn_processors.values())
