"""Dense calls on a CPU: which go to the kernels' compiled loop, what they give there, and that it is said."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
from dit_accel_kernels.backends.torch import compiled, fused
from dit_accel_kernels.choice.race import Chosen
from wan_tiny import RADIAL, denoise, tiny_transformer

import dit_accel
from dit_accel import ConfigError
from dit_accel.attachment import processor as module
from dit_accel.attachment.engine import Engine

pytestmark = pytest.mark.skipif(compiled.compiled_loop().library is None, reason="no C++ compiler is here")
SPARSE = replace(RADIAL, dense_steps=2, dense_layers=1)


def measured_speed(speed):
    """What a race over dense calls found, where the loop takes them."""
    return lambda device, dtype, dim: Chosen("torch", speed if fused.takes(device, dtype) else None)


@pytest.fixture
def always(monkeypatch):
    """Any call is long enough, and the loop three times as fast."""
    monkeypatch.setattr(module, "speed_of_dense_by", measured_speed(3.0))
    monkeypatch.setattr(module, "LEAST_FLOPS", 0.0)


@pytest.fixture
def by_loop(monkeypatch):
    """The calls that the loop takes."""
    found = []
    eager = module.block_sparse_attention_eager
    monkeypatch.setattr(module, "block_sparse_attention_eager", lambda *a, **k: found.append(a[0]) or eager(*a, **k))
    return found


def qkv(dtype=torch.float32, key_heads=4):
    return [
        torch.randn(2, heads, tokens, 24).to(dtype) for heads, tokens in ((4, 50), (key_heads, 70), (key_heads, 70))
    ]


def attention(tokens_first: bool, dense: str = "auto"):
    """Attention as a processor calls it, and the same by torch."""
    own = dispatch_attention_fn if tokens_first else F.scaled_dot_product_attention
    return module.with_loop(own, tokens_first, Engine([], "auto", dense=dense)), own


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens_first", "options"), [
    (False, {}), (False, {"scale": 0.3}), (True, {"backend": None}), (True, {"backend": "native", "scale": 0.3}),
    (True, {"backend": None, "parallel_config": None, "attention_kwargs": None}),
])  # fmt: skip
@pytest.mark.parametrize("key_heads", [4, 2])
def test_plain_calls_are_the_loops_within_rounding(monkeypatch, by_loop, tokens_first, options, key_heads, dtype):
    taken, own = attention(tokens_first)
    tensors = qkv(dtype, key_heads)
    monkeypatch.setattr(module, "LEAST_FLOPS", 4 * tensors[0].numel() * 70)
    tensors = [x.transpose(1, 2) for x in tensors] if tokens_first else tensors
    out = taken(*tensors, attn_mask=None, enable_gqa=key_heads == 2, **options)
    expected = own(*(x.double() for x in tensors), enable_gqa=key_heads == 2, **options)
    assert out.dtype == dtype
    assert len(by_loop) == fused.takes(torch.device("cpu"), dtype)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("left", [
    dict(attn_mask=torch.ones(50, 70, dtype=torch.bool)), dict(is_causal=True), dict(dropout_p=0.5),
    "user", "grad", "autocast", "float64", "slow", "short",
], ids=str)  # fmt: skip
def test_all_others_are_the_users_own_bit_for_bit(monkeypatch, by_loop, left):
    q, k, v = qkv(torch.float64 if left == "float64" else torch.float32)
    if left == "slow":
        monkeypatch.setattr(module, "speed_of_dense_by", measured_speed(module.LEAST_GAIN - 0.01))
    if left == "short":
        monkeypatch.setattr(module, "LEAST_FLOPS", 4 * q.numel() * 70 + 1)
    q.requires_grad_(left == "grad")
    outs = []
    with torch.autocast("cpu", torch.bfloat16, enabled=left == "autocast"):
        for function in attention(False, "user" if left == "user" else "auto"):
            torch.manual_seed(0)
            outs.append(function(q, k, v, **(left if isinstance(left, dict) else {})))
    assert torch.equal(*outs)
    assert not by_loop


@pytest.mark.usefixtures("always")
def test_another_backend_of_diffusers_is_the_users_choice(by_loop):
    taken, _ = attention(True)
    tensors = [x.transpose(1, 2) for x in qkv()]
    taken(*tensors, backend="_native_math")
    with attention_backend("_native_math"):
        taken(*tensors, backend=None)
    assert not by_loop
    taken(*tensors, backend=None)
    assert len(by_loop) == 1


@pytest.mark.usefixtures("always")
def test_dense_steps_and_layers_run_by_the_loop_where_it_is_let(by_loop):
    """Four forwards of eight follow a plan in part; the rest is dense, and so it is said."""
    transformer, outs = tiny_transformer(), {}
    for dense in (None, "user", "auto"):
        by_loop.clear()
        with dit_accel.attach(transformer, SPARSE, dense=dense) as attachment:
            outs[dense] = denoise(transformer)
            report = attachment.report()
        calls = sum(step.dense_layers for step in report.steps)
        assert calls == 2 * (2 * 3 + 2 * 1)
        assert len(by_loop) == (calls if dense == "auto" else 0)
        notes = [note.split(" attention")[0] for note in report.notes if "compiled loop" in note]
        assert notes == [f"{calls} dense"] * (dense == "auto")
    assert torch.equal(outs[None], outs["user"])
    assert not torch.equal(outs["auto"], outs["user"])
    torch.testing.assert_close(outs["auto"], outs["user"], rtol=1e-4, atol=1e-4)


def test_it_is_the_default_of_a_preset_alone():
    for methods, options, dense in (
        ((), dict(preset="balanced"), "auto"),
        ((), {}, "auto"),
        ((SPARSE,), {}, "user"),
        ((), dict(preset="none"), "user"),
        ((), dict(preset="balanced", dense="user"), "user"),
    ):
        transformer = tiny_transformer()
        with dit_accel.attach(transformer, *methods, **options) as attachment:
            assert attachment.engine.dense == dense
        with pytest.raises(ConfigError, match="'auto' or 'user', got 'fast'"):
            dit_accel.attach(transformer, *methods, **{**options, "dense": "fast"})
        assert dit_accel.attachment_of(transformer) is None
