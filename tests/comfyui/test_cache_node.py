"""Step caches and longer videos as nodes, alone and beside sparse attention."""

import time

import comfy_stand_in as comfy
import pytest
import torch
from dit_accel_comfyui.patch import patch_of, with_method
from dit_accel_comfyui.run import Run

from dit_accel import EasyCache

NOISE = torch.randn(1, 4, 6, 8, 8, generator=torch.Generator().manual_seed(1))
WORDS = [torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3)]


class Counting(comfy.Wan):
    """Counts its forwards."""

    def __init__(self):
        super().__init__()
        self.ran = 0

    def forward_orig(self, *args):
        self.ran += 1
        return super().forward_orig(*args)


def told(patcher):
    report = patch_of(patcher).last.report
    assert report is not None
    return report


def dense(model, **options):
    return comfy.sample(comfy.Patcher(model), NOISE, WORDS, **options)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("predictor", ["hold", "taylor"])
def test_every_other_step_is_forecast(together, predictor):
    model = Counting()
    options = "every = 2\nwarmup_steps = 2\nlast_steps = 1"
    patcher = with_method(comfy.Patcher(model), "staticcache", options, predictor=predictor)
    out = comfy.sample(patcher, NOISE, WORDS, steps=8, together=together)
    rows = 1 if together else 2
    kinds = [one.kind for one in told(patcher).forwards]
    expected = ["dense", "dense", *["skipped", "dense"] * 3]
    assert kinds == [kind for kind in expected for _ in range(rows)]
    assert model.ran == 5 * rows
    assert not torch.equal(out, dense(model, steps=8, together=together))


def test_the_speed_up_is_measured_against_the_run_s_own_dense_forwards_but_for_the_first():
    class Slow(Counting):
        def forward_orig(self, *args):
            time.sleep(0.02 if self.ran else 0.4)
            return super().forward_orig(*args)

    patcher = with_method(comfy.Patcher(Slow()), "staticcache", "every = 2\nwarmup_steps = 2\nlast_steps = 1")
    comfy.sample(patcher, NOISE, WORDS, steps=8)
    assert 1.3 < told(patcher).speedup < 3  # 7 forwards, of which 4 ran
    assert told(patcher).dense_seconds < 0.3


def test_forwards_that_another_node_skips_are_told_apart():
    def theirs(executor, x, timestep, *args, **kwargs):
        return torch.zeros_like(x) if timestep[0] < 0.4 else executor(x, timestep, *args, **kwargs)

    patcher = with_method(comfy.Patcher(Counting()), "sol", "block_size = 16", "torch", dense_steps=0, min_tokens=1)
    patcher.add_wrapper_with_key("diffusion_model", "theirs", theirs)
    comfy.sample(patcher, NOISE, WORDS)
    assert [one.elsewhere for one in told(patcher).forwards] == [False] * 4 + [True] * 2
    assert [one.kind for one in told(patcher).forwards] == ["reduced"] * 4 + ["skipped"] * 2
    assert str(told(patcher)).count("another node") == 2


@pytest.mark.parametrize("method", ["easycache", "seacache"])
def test_a_threshold_of_nothing_skips_nothing_to_the_bit(method):
    model = Counting()
    patcher = with_method(comfy.Patcher(model), method, "threshold = 0.0", predictor="hold")
    assert torch.equal(comfy.sample(patcher, NOISE, WORDS), dense(model))


@pytest.mark.parametrize("method", ["easycache", "seacache"])
def test_a_large_threshold_skips_what_may_be_skipped(method):
    model = Counting()
    patcher = with_method(comfy.Patcher(model), method, "threshold = 100.0\nmax_consecutive = 2", predictor="hold")
    comfy.sample(patcher, NOISE, WORDS, steps=8)
    assert 4 <= model.ran < 8
    assert any("reused" in note for note in told(patcher).notes)


def test_a_sampler_that_calls_twice_a_step_is_cached_step_by_step():
    model = Counting()
    patcher = with_method(comfy.Patcher(model), "staticcache", "every = 2\nwarmup_steps = 2\nlast_steps = 1")
    comfy.sample(patcher, NOISE, WORDS, steps=8, calls=2)
    kinds = [one.kind for one in told(patcher).forwards]
    assert kinds[::2] == kinds[1::2]
    assert kinds.count("skipped") == 6


def test_a_cache_that_lacks_what_it_needs_computes_everything_and_says_so():
    model = Counting()
    patcher = with_method(comfy.Patcher(model), "magcache", "", predictor="hold")
    assert torch.equal(comfy.sample(patcher, NOISE, WORDS), dense(model))
    (problem,) = told(patcher).problems
    assert problem.startswith("magcache ")
    assert "ratios" in problem


def test_prompts_that_are_batched_otherwise_from_a_step_on_are_computed_anew():
    model = Counting()
    patcher = with_method(comfy.Patcher(model), "staticcache", "every = 8\nwarmup_steps = 1\nlast_steps = 1")
    comfy.sample(patcher, NOISE, WORDS, steps=6)
    assert model.ran == 2

    class Splitting(Counting):
        def forward(self, x, timestep, context, transformer_options={}, **kwargs):  # noqa: B006
            if timestep[0] > 0.6 or len(x) == 1:
                return super().forward(x, timestep, context, transformer_options=transformer_options, **kwargs)
            parts = []
            for row in range(2):
                part = slice(row, row + 1)
                options = {**transformer_options, "uuids": transformer_options["uuids"][part]}
                options["cond_or_uncond"] = [row]
                parts.append(super().forward(x[part], timestep[part], context[part], transformer_options=options))
            return torch.cat(parts)

    model = Splitting()
    patcher = with_method(comfy.Patcher(model), "staticcache", "every = 8\nwarmup_steps = 1\nlast_steps = 1")
    comfy.sample(patcher, NOISE, WORDS, steps=6)
    ran = {one.branch for one in told(patcher).forwards if one.kind == "dense"}
    assert ran == {"cond_uncond", "cond", "uncond"}


def test_video_and_sound_in_one_list_are_decided_by_the_video():
    run = Run((EasyCache(threshold=0.5, warmup_steps=2, last_steps=1),), "torch")
    sigmas = torch.linspace(1, 0, 7)
    video, sound = torch.ones(1, 4, 2, 4, 4), torch.randn(1, 4, 9)
    ran, outs = [], []
    for step in range(6):
        options = {"sample_sigmas": sigmas, "sigmas": sigmas[step : step + 1], "uuids": ["a"], "cond_or_uncond": [0]}
        streams = [video * (1 + 0.01 * step), sound * 100**step]  # by the sound every step would have to be computed

        def forward(streams=streams, step=step):
            ran.append(step)
            return [streams[0] * 2, streams[1] * 3]

        with torch.inference_mode():
            outs.append(run.forward(comfy.Wan(), forward, {"x": streams}, options))
    assert ran == [0, 1, 5]
    assert [out[0].shape for out in outs] == [video.shape] * 6
    assert [out[1].shape for out in outs] == [sound.shape] * 6


def test_a_cache_and_sparse_attention_act_together():
    model = Counting()
    patcher = with_method(comfy.Patcher(model), "staticcache", "every = 2\nwarmup_steps = 2\nlast_steps = 1")
    patcher = with_method(patcher, "sol", "block_size = 16\ndense_layers = 0", "torch", dense_steps=0.25, min_tokens=1)
    comfy.sample(patcher, NOISE, WORDS, steps=8)
    kinds = [one.kind for one in told(patcher).forwards]
    assert kinds == ["dense", "dense", *["skipped", "reduced"] * 3]


def decayed(q, k, v, heads, trained, alpha, frames):
    """UltraViCo by its formula: centred keys, logits x of far frames become min(x, alpha x)."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2).double() for x in (q, k, v))
    k = k - k.mean(2, keepdim=True)
    logits = q @ k.mT / q.shape[-1] ** 0.5
    frame = torch.arange(frames).repeat_interleave(q.shape[2] // frames)
    far = (frame[:, None] - frame).abs() > trained / 2
    logits = torch.where(far, torch.minimum(logits, alpha * logits), logits)
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2).float()


def test_a_clip_longer_than_trained_decays_by_the_frames_of_the_grid():
    class ByFormula(comfy.Wan):
        def forward_orig(self, x, timestep, context, options):
            def override(func, q, k, v, heads, **kwargs):
                own = q.shape[1] == k.shape[1]
                return decayed(q, k, v, heads, 3, 0.5, 6) if own else func(q, k, v, heads, **kwargs)

            return super().forward_orig(x, timestep, context, {**options, comfy.SLOT: override})

    model = comfy.Wan()
    patcher = with_method(comfy.Patcher(model), "ultravico", "alpha = 0.5", "torch", trained_frames=3)
    out = comfy.sample(patcher, NOISE, WORDS)
    torch.testing.assert_close(out, dense(ByFormula()), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(out, dense(model), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["ultravico", "lvsa"])
def test_a_clip_no_longer_than_trained_is_left_as_it_is(method):
    model = comfy.Wan()
    patcher = with_method(comfy.Patcher(model), method, "", "torch", trained_frames=6)
    assert torch.equal(comfy.sample(patcher, NOISE, WORDS), dense(model))


def test_longer_videos_and_sparse_attention_meet_in_one_call():
    model = comfy.Wan()
    patcher = with_method(comfy.Patcher(model), "ultravico", "alpha = 0.5", "torch", trained_frames=3)
    both = with_method(patcher, "sol", "block_size = 16\nbeta = -8.0\ndense_layers = 0\ndense_steps = 0", "torch")
    one, two = (comfy.sample(of, NOISE, WORDS) for of in (patcher, both))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    assert told(both).forwards[0].planned == 2
