"""The processor's replaced call, on diffusers' own processors of both kinds, and the masks it takes."""

import dataclasses
import inspect
import types

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from dit_accel_kernels import TileLists, block_sparse_attention
from one_layer import MODEL, OneLayer
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dit_accel import ConfigError
from dit_accel.attachment import processor as module
from dit_accel.attachment.backward import NO_TICKET
from dit_accel.attachment.engine import Execution
from dit_accel.attachment.forward_state import as_tensors
from dit_accel.attachment.op import planned_attention
from dit_accel.attachment.processor import _sdpa, dense_attention_of, require_plain, wrap_processor
from dit_accel.methods.attention.radial import RadialAttention
from dit_accel.methods.base import AttentionHandler, Phase
from dit_accel.plan.tiling import Tiling

GRID = (3, 2, 2, 0, 0)


class Everything(AttentionHandler):
    """A method that plans every tile as exact, so that our kernels run what dense attention computes."""

    config_type = RadialAttention
    phase = Phase.LISTS

    def plan(self, plan, call, context):
        return plan.with_tiles(*self.model.tiling.full(context.layout, context.device))


@pytest.fixture
def execution() -> Execution:
    return OneLayer(Everything(RadialAttention(), dataclasses.replace(MODEL, tiling=Tiling(4)))).execution


def test_a_legacy_processor_keeps_its_face_and_its_result(execution):
    processor = CogVideoXAttnProcessor2_0()
    wrapped = wrap_processor(processor, 0, {}, execution)
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
        execution.forward.lay((3, 2, 2, 3, 0))
        planned = attn(hidden, encoder_hidden_states=text)
        assert execution.recorder.planned
        assert execution.recorder.backends == {"reference"}
    for ours, theirs in zip(planned, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_attributes_set_later_are_shared_back():
    from dit_accel.attachment.processor import unwrap_processor

    original = WanAttnProcessor()
    wrapped = wrap_processor(original, 0, {}, Execution([], "reference"))
    wrapped._attention_backend = "native"
    assert unwrap_processor(wrapped, original) is original
    assert vars(original) == {"_attention_backend": "native"}


def test_the_model_s_own_attention_is_at_hand_for_plans_that_need_no_kernel():
    q, k, v = torch.randn(3, 2, 12, 2, 8)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=0.3)
    for processor, tokens_first in ((WanAttnProcessor(), True), (CogVideoXAttnProcessor2_0(), False)):
        dense, found = dense_attention_of(wrap_processor(processor, 0, {}, Execution([], "reference")))
        assert found == tokens_first
        held = (q, k, v) if tokens_first else (x.transpose(1, 2) for x in (q, k, v))
        out = dense(*held, None, 0.3)
        assert torch.equal(out.transpose(1, 2) if tokens_first else out, expected)


def tensors(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(2, 12, 2, 8, dtype=dtype) for _ in range(3)]


def arguments(number, q, k, v, mask=None, grid=GRID, differentiate=False):
    return q, k, v, mask, torch.tensor(0), as_tensors(grid), number, True, None, differentiate


def call(execution, q, k, v, mask=None, grid=GRID):
    return planned_attention(*arguments(execution.number, q, k, v, mask, grid))[0]


@pytest.mark.parametrize("shape", [(2, 12), (2, 1, 1, 12), (1, 1, 1, 12)])
def test_key_padding_is_followed(execution, shape):
    q, k, v = tensors()
    mask = torch.ones(shape, dtype=torch.bool)
    mask[..., 9:] = False
    wide = mask.reshape(-1, 1, 1, 12)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), wide).transpose(1, 2)
    torch.testing.assert_close(call(execution, q, k, v, mask), expected, rtol=1e-5, atol=1e-5)


def test_other_masks_and_lengths_are_refused(execution):
    q, k, v = tensors()
    with pytest.raises(ConfigError, match=r"torch.bool \[1, 1, 12, 12\].*pairs"):
        call(execution, q, k, v, torch.ones(1, 1, 12, 12, dtype=torch.bool).tril())
    with pytest.raises(ConfigError, match=r"12 tokens.*'any'.*16"):
        call(execution, q, k, v, grid=(4, 2, 2, 0, 0))


def test_what_a_plan_cannot_do_is_refused():
    for arguments, message in (
        ((0.1, False, None), r"dropout_p=0.1"),
        ((0.0, True, None), "is_causal=True"),
        ((0.0, False, object()), r"context parallelism.*compile_repeated_blocks"),
    ):
        with pytest.raises(ConfigError, match=message):
            require_plain(*arguments)


def test_the_operator_passes_opcheck(execution):
    q, k, v = (x.requires_grad_() for x in tensors())
    given = arguments(execution.number, q, k, v, differentiate=True)
    torch.library.opcheck(planned_attention, given, test_utils=("test_schema", "test_faketensor"))


def test_the_operator_gives_a_ticket_with_and_without_a_backward(execution):
    """Both outputs are tensors whatever follows: a graph of the transformer has them as its own."""
    q, k, v = (x.requires_grad_() for x in tensors())
    out, ticket = planned_attention(*arguments(execution.number, q, k, v, differentiate=True))
    torch.autograd.grad(out.sum(), (q, k, v))
    with torch.no_grad():
        _, none = planned_attention(*arguments(execution.number, q, k, v))
    assert ticket.dtype == none.dtype == torch.int64
    assert ticket.shape == none.shape == ()
    assert int(none) == NO_TICKET != int(ticket)


def test_planned_calls_and_the_kernels_own_operators_stay_out_of_cuda_graphs():
    """A captured call would follow one step's plan for good, or read what was derived from lists that are gone."""
    from torch._inductor.utils import get_first_incompatible_cudagraph_node
    from torch.fx.experimental.proxy_tensor import make_fx

    def planned(q):
        return planned_attention(*arguments(0, q, q, q))[0]

    tiles = TileLists.full(12, 12, block_q=4, block_k=4)

    def kernel(q):
        return block_sparse_attention(q, q, q, tiles)

    found = []
    for call in (planned, kernel):
        graph = make_fx(call, tracing_mode="fake", _allow_non_fake_inputs=True)(tensors()[0])
        found.append(get_first_incompatible_cudagraph_node(graph))
    assert found[0].target is torch.ops.dit_accel.planned_attention.default
    assert found[1].target is torch.ops.dit_accel_kernels.block_sparse_attention.default
    for namespace in ("dit_accel", "dit_accel_kernels"):
        for name in ("planned_attention", "block_sparse_attention"):
            for suffix in ("", "_backward"):
                operator = getattr(getattr(torch.ops, namespace), name + suffix, None)
                if operator is not None:
                    assert torch.Tag.cudagraph_unsafe in operator.default.tags, name


def test_an_eager_call_goes_straight_to_the_plan_and_others_through_the_operator(execution, monkeypatch):
    through = []

    def operator(*given):
        through.append(given[-1])
        return planned_attention(*given)

    monkeypatch.setattr(module, "planned_attention", operator)
    execution.forward.processor = types.SimpleNamespace(_dit_accel_layer=torch.tensor(0))
    execution.forward.lay(GRID)
    q, k, v = tensors()
    out = module.planned(q, k, v, None, None, True, execution)
    assert not through
    assert torch.equal(out, call(execution, q, k, v))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        made = module.planned(*(fake.from_tensor(x) for x in (q, k, v)), None, None, True, execution)
    assert (through, made.shape, type(made)) == ([False], out.shape, FakeTensor)
    trained = module.planned(q.requires_grad_(), k, v, None, None, True, execution)
    assert through == [False, True]
    assert torch.equal(trained, out)


def test_an_attachment_that_is_gone_says_so():
    q, k, v = tensors()
    with pytest.raises(RuntimeError, match="attachment 999999"):
        planned_attention(*arguments(999999, q, k, v))


def test_a_processor_kept_by_others_is_a_plain_one_after_detach():
    """diffusers keeps the processors that fused ones replace, and puts them back when told to."""
    import dit_accel
    from dit_accel import RadialAttention

    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=2, sample_width=16, sample_height=16, sample_frames=17,
        use_rotary_positional_embeddings=True,
    ).eval()  # fmt: skip
    inputs = dict(
        hidden_states=torch.randn(1, 5, 4, 8, 8), encoder_hidden_states=torch.randn(1, 6, 16),
        timestep=torch.tensor([5]), return_dict=False,
    )  # fmt: skip
    with torch.no_grad():
        plain = model(**inputs)[0]
        method = RadialAttention(
            block_size=16, decay_factor=0.2, near="half", sink=False, dense_steps=0, dense_layers=0
        )
        attachment = dit_accel.attach(model, method)
        assert not torch.equal(model(**inputs)[0], plain)
        model.fuse_qkv_projections()
        attachment.detach()
        model.unfuse_qkv_projections()
        assert torch.equal(model(**inputs)[0], plain)
    assert {type(processor).__name__ for processor in model.attn_processors.values()} == {"CogVideoXAttnProcessor2_0"}
    assert all(type(one) is CogVideoXAttnProcessor2_0 for one in model.attn_processors.values())


def test_the_stand_in_for_torchs_attention_has_its_defaults():
    taken = inspect.signature(_sdpa(F.scaled_dot_product_attention, Execution([], "reference"))).parameters
    defaults = {name: one.default for name, one in taken.items() if one.default is not inspect.Parameter.empty}
    assert defaults == {
        "attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False,
    }  # fmt: skip


@pytest.mark.parametrize("tokens_first", [True, False])
@pytest.mark.parametrize("key_heads", [2, 4])
def test_dense_attention_groups_heads_only_where_keys_have_fewer(tokens_first, key_heads):
    seen = []

    class Wrapped:
        _dit_accel_dense = (lambda q, k, v, **given: seen.append(given["enable_gqa"])), tokens_first

    attend, first = dense_attention_of(Wrapped())
    assert first is tokens_first
    q, k = (torch.zeros(1, 6, heads, 8) for heads in (4, key_heads))
    q, k = (q, k) if tokens_first else (q.transpose(1, 2), k.transpose(1, 2))
    attend(q, k, k, None, None)
    assert seen == [key_heads < 4]
