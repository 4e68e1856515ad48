"""Every backend over one list of calls: output, LSE and gradients against the float64 specification."""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

import fa4_stand_in
import pytest
import torch
from dit_accel_kernels.backends import flex
from kernel_cases import CALLS, Call, check_against_reference, check_gradients

pytestmark = pytest.mark.filterwarnings(
    "ignore:divide by zero:RuntimeWarning",  # log of a pooled tile without a key, in the interpreter
    "ignore:flex_attention called without torch.compile",
    "ignore:return_lse is deprecated",
)


def logits_of(call: Call, q: torch.Tensor, k: torch.Tensor) -> float:
    """At most how large a logit is, in float32, where nothing but it limits what is exact."""
    if call.dtype != torch.float32:
        return 1.0
    scale = call.dim**-0.5 if call.scale is None else abs(call.scale)
    return max(1.0, float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) * scale)


@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", ["loop", "operations", "triton"], indirect=True)
def test_a_call_and_its_gradients_are_what_the_specification_says(backend, name):
    call = CALLS[name]
    tiles, (q, k, v), arguments = call.lists(), call.tensors(), call.arguments()
    logits = logits_of(call, q, k)
    check_against_reference(q, k, v, tiles, backend, logits=logits if call.size > 1 else 1, **arguments)
    check_gradients(q, k, v, tiles, backend, logits=logits, **arguments)


@pytest.mark.parametrize("name", ["keys left out", "masks inside and a head dim of v", "everything", "a list a head"])
def test_flex_is_what_the_specification_says(monkeypatch, name):
    """Its tables and functions without a compiler, on any machine and with LSE."""
    monkeypatch.setattr(flex, "_compiled", lambda: flex.flex_call)
    monkeypatch.setattr(flex, "check", lambda problem, need_lse: None)
    call = CALLS[name]
    check_against_reference(*call.tensors(), call.lists(), "flex", **call.arguments())


FA4 = {
    "nothing pooled": Call(features="", num_q=300, num_k=300, blocks=(128, 128), dtype=torch.bfloat16),
    "a list a head": Call(batch=2, groups=4, num_q=140, num_k=400, dim=24, blocks=(128, 128), dtype=torch.float16),
    "keys left out, wide rows": Call(
        num_q=300, num_k=200, dim=64, blocks=(256, 128), dtype=torch.bfloat16, features="pooled length mask heads"
    ),
    "more tiles than a word of bits": Call(num_q=20, num_k=5000, dim=8, blocks=(128, 128), dtype=torch.bfloat16),
    "decay and order": Call(
        num_q=300, num_k=300, blocks=(128, 128), dtype=torch.bfloat16, features="pooled decay order", groups=2
    ),
    "masks inside": Call(
        num_q=270, num_k=270, blocks=(128, 128), dtype=torch.bfloat16, features="pooled inside mask decay", groups=2
    ),
    "tokens first": Call(num_q=300, num_k=300, blocks=(128, 128), dtype=torch.float16, layout="bshd"),
    "bits that pool": Call(num_q=140, num_k=400, blocks=(128, 128), dtype=torch.bfloat16, features="pooled demoted"),
}


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


@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize(
    "name",
    ["one query", "tokens first", "head dim 72", "head dim 96", "tiles that no chunk divides", "everything",
     "masks inside and a head dim of v", "bits that pool"],
)  # fmt: skip
def test_eight_bits_are_what_their_simulation_says(name, precision):
    call = CALLS[name]
    q, k, v = call.tensors()
    check_against_reference(q, k + 2, v, call.lists(), "triton", precision=precision, **call.arguments())
