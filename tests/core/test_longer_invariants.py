"""What decay and factors of heads do to attention, on the embedded models' own queries and keys: as published.

The published claims are about attention, so they are tested there: it spreads out beyond the trained length, and decay
brings it back. What holds of any call is among the kernels' tests.
"""

import itertools

import pytest
import torch
from recorded_calls import (
    PICTURE,
    VIDEOS,
    alike,
    between_frames,
    by_distance,
    calls_of,
    centred_logits,
    clip_size,
    decayed,
    frame_distance,
    generated,
    in_bands,
    loaded,
)
from some_cases import some
from torch.nn.functional import scaled_dot_product_attention

import dit_accel
from dit_accel import UltraImage, UltraViCo
from dit_accel.attachment.backends import UnplannedRun
from dit_accel.methods.positions.entropy import focus, token_entropy
from dit_accel.rules.ultravico import DecayRule
from dit_accel.testing.recording import recorded

MODELS = [*VIDEOS, "flux-tiny"]
CLIPS = pytest.mark.parametrize("name", some(VIDEOS, "wan-tiny"))


# The published claims


@CLIPS
def test_attention_spreads_out_beyond_the_trained_length_and_decay_brings_it_back(name):
    """Test b: the curve of attention by distance, and its part within the trained window."""
    trained = VIDEOS[name].trained
    near = slice(0, trained // 2 + 1)
    at_home = by_distance(between_frames(calls_of(name, trained)))
    rules = [None, *(DecayRule(trained_frames=trained, alpha=alpha) for alpha in (0.9, 0.7, 0.5))]
    curves = [by_distance(between_frames(calls_of(name, 3 * trained), rule)) for rule in rules]
    assert [float(curve.sum()) for curve in (at_home, *curves)] == pytest.approx([1.0] * 5)
    home, plain, *gathered = (float(curve[near].sum()) for curve in (at_home, *curves))
    assert plain < home - 0.3
    assert all(b > a + 0.04 for a, b in itertools.pairwise([plain, *gathered]))
    assert gathered[0] < home
    assert gathered[-1] > plain + 0.4 * (home - plain)
    assert (curves[3][near] > curves[0][near]).mean() > 0.8


@CLIPS
def test_attention_repeats_after_the_models_period_and_bands_end_that(name):
    """Test a on recorded calls: rows of attention one period apart are alike, decay thins that out, bands end it."""
    video = VIDEOS[name]
    alpha = DecayRule(trained_frames=video.trained, alpha=0.9)
    bands = DecayRule(trained_frames=video.trained, alpha=0.9, beta=0.6, period=video.period, gamma=video.gamma)
    shares = [between_frames(calls_of(name, video.frames), rule) for rule in (None, alpha, bands)]
    plain, thinned, ended = (alike(one, video.period) for one in shares)
    assert plain > 0.6
    assert ended < thinned < plain
    assert ended < plain - 0.3
    masses = [in_bands(by_distance(one), video.period, video.gamma) for one in shares]
    assert masses[1] < 0.95 * masses[0]
    assert masses[2] < 0.6 * masses[0]


# How local heads are


@pytest.mark.parametrize("name", some(MODELS, "wan-tiny", "flux-tiny"))
def test_heads_of_a_model_differ_and_concentrate(name):
    """Invariant 10 on recorded calls: factors within bounds, falling with entropy; concentrated heads are sharper."""
    calls = calls_of(name, 3 * VIDEOS[name].trained if name in VIDEOS else 1)
    entropy = torch.stack([token_entropy(call.q[:, :, ::5], call.k) for call in calls])
    assert float(entropy.max() - entropy.min()) > 0.5
    factors = focus(entropy, entropy.min(), entropy.max(), 1.0, 1.3, 2.0)
    assert float(factors.min()) == 1.0
    assert float(factors.max()) == pytest.approx(1.3)
    assert bool((factors.flatten()[entropy.flatten().argsort()].diff() <= 0).all())
    after = torch.stack(
        [token_entropy(call.q[:, :, ::5] * f[..., None, None], call.k) for call, f in zip(calls, factors, strict=True)]
    )
    assert bool((after <= entropy + 1e-5).all())
    assert float((entropy - after).max()) > 0.02


# Attached to the models


def test_each_branch_of_the_image_model_has_its_own_factors_and_detach_leaves_none():
    """Invariant 11: the factors follow from the branch's own queries and keys of the first step."""
    pipe = loaded("flux-tiny")
    plain = generated(pipe, "flux-tiny", 2, **PICTURE)
    with dit_accel.attach(pipe, UltraImage()) as attachment, recorded(attachment) as calls:
        changed = generated(pipe, "flux-tiny", 2, **PICTURE)
    assert not torch.equal(changed, plain)
    assert torch.equal(generated(pipe, "flux-tiny", 2, **PICTURE), plain)
    factors = {}
    for branch in ("cond", "uncond"):
        first, second = ([c for c in calls if (c.context.branch, c.context.step_index) == (branch, i)] for i in (0, 1))
        picture = first[0].context.layout.visual  # no more tokens than rows are measured
        entropy = torch.stack([token_entropy(call.q[:, :, picture], call.k) for call in first])
        expected = focus(entropy, entropy.min(), entropy.max(), 1.0, 1.3, 2.0)
        factors[branch] = torch.stack([call.plan.head_scale for call in second])
        torch.testing.assert_close(factors[branch], expected)
        for call in second:
            q = call.q * call.plan.head_scale[..., None, None]
            torch.testing.assert_close(call.out, scaled_dot_product_attention(q, call.k, call.v))
    assert float((factors["cond"] - factors["uncond"]).abs().max()) > 0.01


@CLIPS
def test_decay_is_what_a_long_clips_calls_get_until_it_is_detached(name):
    """Invariant 11: a clip of the trained length, and one after detaching, are as before, bit for bit.

    The first frame sees no further than the trained length.
    """
    pipe, trained = loaded(name), VIDEOS[name].trained
    short, long = clip_size(trained), clip_size(3 * trained)
    plain = [generated(pipe, name, 1, **size) for size in (short, long)]
    with dit_accel.attach(pipe, UltraViCo(alpha=0.7)) as attachment, recorded(attachment) as calls:
        with pytest.warns(UnplannedRun, match=r"ultravico.*nothing"):
            assert torch.equal(generated(pipe, name, 1, **short), plain[0])
        calls.clear()
        assert not torch.equal(generated(pipe, name, 1, **long), plain[1])
    assert all(torch.equal(generated(pipe, name, 1, **size), x) for size, x in zip((short, long), plain, strict=True))
    assert {call.context.branch for call in calls} == {"cond", "uncond"}
    rule = DecayRule(trained_frames=trained, alpha=0.7)
    first = calls[0].context.layout.tokens_per_frame
    for call in calls:
        logits = decayed(centred_logits(call), frame_distance(call), rule)
        logits[:, :, :first, trained * first :] = -torch.inf
        torch.testing.assert_close(call.out, (logits.softmax(-1) @ call.v.double()).float(), rtol=1e-4, atol=1e-5)
