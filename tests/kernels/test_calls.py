"""Every backend over one list of calls: output, LSE and gradients against the float64 specification."""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

from dataclasses import fields, is_dataclass, replace
from typing import Any

import fa4_stand_in
import pytest
from some_cases import some
import torch
from dit_accel_kernels import Selection, Vote, block_sparse_attention, block_sparse_attention_eager, pack_bits
from dit_accel_kernels.backends import flex
from kernel_cases import CALLS, Call, attend, check_against_reference, check_gradients
from kernel_cases import gradients, qkv, random_lists

pytestmark = pytest.mark.filterwarnings(
    "ignore:divide by zero:RuntimeWarning",  # log of a pooled tile without a key, in the interpreter
    "ignore:flex_attention called without torch.compile",
    "ignore:return_lse is deprecated",
)
WIDE, HALF = torch.float64, torch.bfloat16


def logits_of(call: Call, q: torch.Tensor, k: torch.Tensor) -> float:
    """At most how large a logit is, in float32, where nothing but it limits what is exact."""
    if call.dtype != torch.float32:
        return 1.0
    scale = call.dim**-0.5 if call.scale is None else abs(call.scale)
    return max(1.0, float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) * scale)


@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", some(("loop", "operations", "triton"), "loop", "operations"), indirect=True)
def test_a_call_and_its_gradients_are_what_the_specification_says(backend, name):
    call = CALLS[name]
    tiles, (q, k, v), arguments = call.lists(), call.tensors(), call.arguments()
    logits = logits_of(call, q, k)
    check_against_reference(q, k, v, tiles, backend, logits=logits if call.size > 1 else 1, **arguments)
    check_gradients(q, k, v, tiles, backend, logits=logits, **arguments)


def strided(x: Any) -> Any:
    """The same with other numbers between any two."""
    if isinstance(x, torch.Tensor):
        return torch.stack([x, x.flip(0)], -1)[..., 0]
    return replace(x, **{field.name: strided(getattr(x, field.name)) for field in fields(x)}) if is_dataclass(x) else x


@pytest.mark.parametrize("features", ["length mask decay order heads", "inside shared", "bits mask"])
@pytest.mark.parametrize("backend", some(("loop", "operations", "triton"), "loop", "operations"), indirect=True)
def test_no_tensor_of_a_call_need_lie_in_one_piece(backend, features):
    call, found = Call(batch=2, groups=2, features=f"pooled {features}"), []
    leaves, tiles, arguments = call.tensors(), call.lists(), call.arguments()
    if "bits" in features:
        keep, pinned, routed = (pack_bits(torch.rand(shape) < 0.5) for shape in ((2, 2, 3, 3), (3, 3), (2, 2, 3, 3)))
        arguments["selection"] = Selection(keep=keep, pinned=pinned, routed=routed)
    for laid in (lambda x: x, strided):
        inputs = [laid(x).requires_grad_() for x in leaves]
        options = {name: laid(x) for name, x in arguments.items()}
        out = block_sparse_attention(*inputs, laid(tiles), backend=backend, **options)
        found.append([out, *torch.autograd.grad(out, inputs, laid(torch.ones_like(out)))])
    assert all(map(torch.equal, *found))


ON_FLEX = "keys left out", "masks inside", "masks inside and a head dim of v", "everything", ""


@pytest.mark.parametrize("name", some(ON_FLEX, *ON_FLEX[-2:]))
def test_flex_is_what_the_specification_says(monkeypatch, name):
    """Its tables and functions without a compiler, on any machine and with LSE."""
    monkeypatch.setattr(flex, "_compiled", lambda: flex.flex_call)
    monkeypatch.setattr(flex, "check", lambda problem: None)
    call = CALLS.get(name, Call(batch=2, features="mask"))
    check_against_reference(*call.tensors(), call.lists(), "flex", **call.arguments())


def fa4_call(num_q: int, num_k: int, features: str = "pooled", **options) -> Call:
    return Call(num_q=num_q, num_k=num_k, features=features, **{"blocks": (128, 128), "dtype": HALF, **options})


FA4 = {
    "a list a head": fa4_call(140, 400, batch=2, groups=4, dim=24, dtype=torch.float16),
    "masks inside": fa4_call(270, 270, "pooled inside mask decay", groups=2),
    "keys left out, wide rows": fa4_call(300, 200, "pooled length mask heads", dim=64, blocks=(256, 128)),
    "nothing pooled": fa4_call(300, 300, ""),
    "more tiles than a word of bits": fa4_call(20, 4200, dim=8, heads=1),
    "decay and order": fa4_call(300, 300, "pooled decay order", groups=2),
    "tokens first": fa4_call(300, 300, dtype=torch.float16, layout="bshd"),
    "bits that pool": fa4_call(140, 400, "pooled demoted"),
}


@pytest.mark.sample(4)
@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("name", FA4)
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_flash_attention_is_given_what_the_specification_says(monkeypatch, arch, name):
    """Whole tiles are its blocks; those with a mask inside and pooled ones are added to its output by LSE."""
    fa4_stand_in.install(monkeypatch, arch)
    call = FA4[name]
    tiles, (q, k, v), arguments = call.lists(), call.tensors(), call.arguments()
    check_against_reference(q, k, v, tiles, "fa4", **arguments)
    check_gradients(q, k, v, tiles, "fa4", **arguments)
    assert fa4_stand_in.calls


@pytest.mark.sample
@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize(
    "name",
    ["one query", "tokens first", "head dim 72", "head dim 96", "tiles that no chunk divides", "everything",
     "masks inside and a head dim of v", "bits that pool", "a list a head and batch"],
)  # fmt: skip
def test_eight_bits_are_what_their_simulation_says(name, precision):
    call = CALLS[name]
    q, k, v = call.tensors()
    check_against_reference(q, k + 2, v, call.lists(), "triton", precision=precision, **call.arguments())


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_a_batch_of_none_gives_nothing(backend):
    leaves = [x.requires_grad_() for x in qkv(0, 2, 1, 40, 40, 16, torch.float32)]
    selection = Selection(keep=pack_bits(torch.rand(0, 2, 3, 3) < 0.5), vote=Vote())
    options = dict(return_lse=True, return_tiles=True, key_mask=torch.ones(0, 40, dtype=torch.bool), backend=backend)
    found = attend(*leaves, random_lists(1, 40, 40, 16, 16), selection=selection, **options)
    assert [x.shape for x in found] == [(0, 2, 40, 16), (0, 2, 40), (0, 2, 3, 1), (0, 2, 3, 1)]
    assert [x.shape for x in torch.autograd.grad(found[0].sum(), leaves)] == [x.shape for x in leaves]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("masked", [False, True])
def test_autocast_and_the_eager_entry_change_no_bit(backend, masked):
    leaves = [x.requires_grad_() for x in qkv(2, 2, 2, 40, 40, 16, torch.float32)]
    tiles, mask = random_lists(1, 40, 40, 16, 16), torch.rand(2, 40) > 0.3 if masked else None

    def call(function=attend) -> torch.Tensor:
        return function(*leaves, tiles, layout="bhsd", backend=backend, key_mask=mask)

    outs = [call()]
    with torch.autocast("cpu", dtype=HALF):
        outs += [call(), call(block_sparse_attention_eager)]
    assert all(torch.equal(x, outs[0]) for x in outs)
    assert [x.requires_grad for x in outs] == [True, True, False]
    grads = [torch.autograd.grad(x.sum(), leaves) for x in outs[:2]]
    if backend != "reference":  # whose gradient is autograd's, which autocast does reach
        with torch.autocast("cpu", dtype=HALF):
            grads.append(torch.autograd.grad(call().sum(), leaves))
    assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(other, grads[0], strict=True))
    with pytest.raises(TypeError, match="densty"):
        block_sparse_attention_eager(*leaves, tiles, layout="bhsd", densty=1)


def test_gradients_of_head_scales_are_exact_at_0_and_below_too():
    """No kernel computes them: they are summed from those of the queries, which have none at 0."""
    inputs, tiles = qkv(2, 4, 2, 30, 30, 8, WIDE), random_lists(1, 30, 30, 8, 7)
    seeds = [torch.randn(2, 4, 30, 8), torch.randn(2, 4, 30)]
    scales = torch.tensor([[0.0, 1.0, -0.7, 0.3], [2.0, 0.0, 0.0, 1e-30]], dtype=WIDE, requires_grad=True)
    features = dict(layout="bhsd", key_length=torch.tensor([30, 17]), token_order=torch.randperm(30))
    features |= dict(identity_mix=torch.tensor([0.0, 0.5, 1.0, 0.3]))
    call = (inputs, seeds, tiles)
    found, expected = (gradients(name, *call, head_scale=scales, **features) for name in ("torch", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert found[3].shape == scales.shape
    assert not found[0][0, 0].any()
    assert found[0][0, 1].any()
