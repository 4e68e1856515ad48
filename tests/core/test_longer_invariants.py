"""What decay and factors of heads do to attention, on the embedded models' own queries and keys: as published.

The published claims are about attention, so they are tested there: it spreads out beyond the trained length, and decay
brings it back; harmonic frequencies repeat themselves; the released rule is no bias.
"""

import itertools

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from dit_accel_assets import held_out_prompts, model_defaults, model_path
from dit_accel_kernels import FrameDecay, TileLists, block_sparse_attention
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.adapters.registry import adapter_for
from dit_accel.methods.positions.entropy import focus, token_entropy
from dit_accel.rules.rope import frequencies
from dit_accel.rules.ultravico import DecayRule
from dit_accel.testing.everything import planned
from dit_accel.testing.recording import recorded

TRAINED = 17  # latent frames of wan-tiny


def run_once(name, **size):
    pipe = DiffusionPipeline.from_pretrained(model_path(name), dtype=torch.float32)
    call = {**model_defaults(name), "num_inference_steps": 1, **size}
    adapter = adapter_for(type(pipe.transformer).__name__)
    with planned(pipe.transformer, adapter) as attachment, recorded(attachment) as calls:
        generator = torch.Generator().manual_seed(0)
        pipe(held_out_prompts(name, 1)[0], **call, generator=generator, output_type="latent")
    return [call for call in calls if call.context.branch != "uncond"]


@pytest.fixture(scope="module")
def wan():
    """Calls of wan-tiny by times the trained length: layers of [1, 5, S, 32]; small pictures, 4 tokens a frame."""
    return {
        ratio: run_once("wan-tiny", height=16, width=16, num_frames=2 * (ratio * TRAINED - 1) + 1) for ratio in (1, 3)
    }


@pytest.fixture(scope="module")
def flux():
    return run_once("flux-tiny", height=128, width=128)


def logits_of(call):
    q, k = call.q.double(), call.k.double()
    return (q @ (k - k.mean(2, keepdim=True)).mT) * call.q.shape[-1] ** -0.5


def distances(frames, per_frame):
    place = torch.arange(frames * per_frame) // per_frame
    return (place[:, None] - place).abs()


def in_window(logits, distance):
    return float((logits.softmax(-1) * (distance <= TRAINED // 2)).sum(-1).mean())


def per_frame(call):
    return call.context.layout.tokens_per_frame


def test_attention_spreads_out_beyond_the_trained_length_and_decay_brings_it_back(wan):
    """Test b: the share of attention within the window, mean over layers, heads and rows."""
    found = {}
    for ratio, calls in wan.items():
        distance = distances(ratio * TRAINED, per_frame(calls[0]))
        found[ratio] = np.mean([in_window(logits_of(call), distance) for call in calls])
    assert found[3] < found[1] - 0.05
    shares = [found[3]]
    distance = distances(3 * TRAINED, per_frame(wan[3][0]))
    for alpha in (0.9, 0.7, 0.5):
        table = torch.from_numpy(DecayRule(trained_frames=TRAINED, alpha=alpha).table(3 * TRAINED)).double()
        t = table[distance]
        shares.append(np.mean([in_window(torch.minimum(x := logits_of(call), t * x), distance) for call in wan[3]]))
    assert all(b > a for a, b in itertools.pairwise(shares))
    assert shares[1] <= found[1]


def test_the_released_rule_is_no_bias(wan):
    """Test of the wrong-bias trap: ln(alpha) added to a logit is another rule, and by far the weaker one above 1."""
    logits = logits_of(wan[3][3])
    distance = distances(3 * TRAINED, per_frame(wan[3][3]))
    far, alpha = distance > TRAINED // 2, 0.9
    decayed = torch.where(far, torch.minimum(logits, alpha * logits), logits)
    biased = logits + far * np.log(alpha)
    assert float((decayed.softmax(-1) - biased.softmax(-1)).abs().max()) > 1e-3
    scaled = {x: (np.exp(alpha * x - x), alpha) for x in (2.0, 10.0, 20.0)}
    assert [round(float(a), 3) for a, _ in scaled.values()] == [0.819, 0.368, 0.135]
    below = logits < 0
    assert torch.equal(decayed[below], logits[below])
    assert not torch.equal(biased[below], logits[below])


@pytest.mark.parametrize(("axis", "repeats"), [((16, 256.0), True), ((44, 1e4), False)], ids=["hunyuan", "wan"])
def test_harmonic_frequencies_repeat_and_bands_end_that(axis, repeats):
    """Test a: queries and keys that differ by position alone."""
    own = frequencies("none", *axis)[:4]
    period, frames = 2 * np.pi / own[3], 200
    distance = np.abs(np.subtract.outer(np.arange(frames), np.arange(frames)))
    logits = torch.from_numpy(2 * np.cos(distance[..., None] * own).sum(-1))
    turn = round(float(period))

    def alike(x):
        p = x.softmax(-1)
        rows = range(60, 100)
        pairs = [(p[i], p[i + turn]) for i in rows]
        return float(np.mean([np.corrcoef(a.numpy(), b.numpy())[0, 1] for a, b in pairs]))

    assert (alike(logits) > 0.9) == repeats
    if not repeats:
        return
    rule = DecayRule(trained_frames=33, alpha=0.9, beta=0.6, period=50.0, gamma=4.0)
    t = torch.from_numpy(rule.table(frames)).double()[torch.from_numpy(distance)]
    decayed = torch.minimum(logits, t * logits)
    assert alike(decayed) < alike(logits) - 0.2
    band = torch.from_numpy((np.abs(distance - 50) <= 4) | (np.abs(distance - 100) <= 4))
    masses = [float((x.softmax(-1) * band).sum(-1).mean()) for x in (logits, decayed)]
    assert masses[1] < 0.5 * masses[0]


@given(x=st.floats(-50, 50), t=st.floats(0.01, 1))
def test_the_minimum_is_the_piecewise_rule(x, t):
    """Invariant 2: positive logits shrink, others stay bit for bit, and the order of logits stays."""
    assert min(x, t * x) == (t * x if x > 0 else x)
    assert min(x, t * x) <= min(x + 1, t * (x + 1))


def decayed_attention(call, t_of, **options):
    layout = call.context.layout
    frames = (torch.arange(layout.visual_tokens) // layout.tokens_per_frame).int()
    decay = FrameDecay(table=torch.from_numpy(t_of), q_frames=frames, k_frames=frames)
    return run_kernel(call.q, call.k, call.v, frame_decay=decay, **options)


def run_kernel(q, k, v, backend="reference", **options):
    tiles = TileLists.full(q.shape[2], k.shape[2], block_q=64, block_k=64)
    return block_sparse_attention(q, k, v, tiles, layout="bhsd", backend=backend, **options)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_neutral_settings_change_nothing(wan, backend):
    """Invariant 1: t = 1 and factors of 1 are the call without them, bit for bit."""
    call = wan[3][2]
    plain = run_kernel(call.q, call.k, call.v, backend)
    heads = torch.ones(call.q.shape[1])
    assert torch.equal(run_kernel(call.q, call.k, call.v, backend, head_scale=heads), plain)
    ones = np.ones(3 * TRAINED, np.float32)
    assert torch.allclose(decayed_attention(call, ones, backend=backend), plain, atol=1e-6)
    assert DecayRule(trained_frames=200, alpha=0.5).table(3 * TRAINED).tolist() == ones.tolist()


def test_a_factor_of_a_head_is_a_factor_of_its_queries(wan):
    """Invariants 5 and 8: in the call or on the queries; permuted with its head; more of it, less entropy."""
    call = wan[3][4]
    q, k, v = (x.double() for x in (call.q, call.k, call.v))
    scale = torch.linspace(0.5, 2.0, q.shape[1])
    inside = run_kernel(q, k, v, head_scale=scale)
    torch.testing.assert_close(run_kernel(q * scale[:, None, None], k, v), inside)
    order = torch.randperm(q.shape[1])
    permuted = run_kernel(q[:, order], k[:, order], v[:, order], head_scale=scale[order])
    torch.testing.assert_close(permuted, inside[:, order])
    torch.testing.assert_close(
        run_kernel(q, k, v, head_scale=torch.zeros(q.shape[1])), v.mean(2, keepdim=True).expand_as(v)
    )
    entropies = [token_entropy(factor * q[:, :, ::7], k) for factor in (0.5, 1.0, 1.3, 2.0, 4.0)]
    assert all(bool((b <= a + 1e-9).all()) for a, b in itertools.pairwise(entropies))


def test_a_shift_of_all_keys_matters_to_decay_alone(wan):
    """Invariant 6: factors do not see it; decay does, unless the keys are centred."""
    call = wan[3][1]
    shift = torch.randn(call.k.shape[1], 1, call.k.shape[3])
    q, k, v = (x.double() for x in (call.q, call.k, call.v))
    table = DecayRule(trained_frames=TRAINED, alpha=0.5).table(3 * TRAINED)
    frames = (torch.arange(q.shape[2]) // per_frame(call)).int()
    decay = FrameDecay(table=torch.from_numpy(table), q_frames=frames, k_frames=frames)
    heads = torch.full((q.shape[1],), 1.3)
    moved = k + shift
    torch.testing.assert_close(run_kernel(q, moved, v, head_scale=heads), run_kernel(q, k, v, head_scale=heads))
    assert not torch.allclose(run_kernel(q, moved, v, frame_decay=decay), run_kernel(q, k, v, frame_decay=decay))
    centred = [x - x.mean(2, keepdim=True) for x in (k, moved)]
    torch.testing.assert_close(*(run_kernel(q, x, v, frame_decay=decay) for x in centred))


def test_heads_of_the_image_model_differ_and_concentrate(flux):
    """Invariant 10 on recorded calls: factors within bounds, falling with entropy; concentrated heads are sharper."""
    entropy = torch.stack([token_entropy(call.q[:, :, ::5], call.k) for call in flux])
    assert float(entropy.max() - entropy.min()) > 0.5
    assert float(entropy.max()) <= np.log(flux[0].k.shape[2]) + 1e-4
    factors = focus(entropy, entropy.min(), entropy.max(), 1.0, 1.3, 2.0)
    assert float(factors.min()) == 1.0
    assert float(factors.max()) == pytest.approx(1.3)
    after = torch.stack(
        [token_entropy(call.q[:, :, ::5] * f[..., None, None], call.k) for call, f in zip(flux, factors, strict=True)]
    )
    assert bool((after <= entropy + 1e-5).all())
    assert float((entropy - after).max()) > 0.02
