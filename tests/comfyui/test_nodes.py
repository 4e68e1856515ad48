"""Sparse attention, step caches and longer videos as nodes: what they give, decline and to whom, and the report."""

import time
from concurrent.futures import ThreadPoolExecutor

import comfy_stand_in as comfy
import pytest
import torch
from dit_accel_comfyui.patch import patch_of, with_method
from dit_accel_comfyui.run import Run

from dit_accel import EasyCache
from dit_accel.methods.attention.sparsed import SparseDHandler

SMALL = "block_size = 16\ndense_layers = 0"
NOISE = torch.randn(1, 4, 6, 8, 8, generator=torch.Generator().manual_seed(1))
WORDS = [torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3)]
KEEP_ALL = [("sol", "beta = -8.0"), ("sparsed", "density = 1.0"), ("lite", "threshold = -1000.0")]
EVERY_OTHER = "every = 2\nwarmup_steps = 2\nlast_steps = 1"


def sparse(model, method="sol", options="", **given):
    given = {"dense_steps": 0.2, "min_tokens": 1, **given}
    return with_method(comfy.Patcher(model), method, f"{SMALL}\n{options}", "torch", **given)


def report(patcher):
    report = patch_of(patcher).last.report
    assert report is not None
    return report


def run(patcher, noise=NOISE, words=WORDS, **options):
    """Sample with a patcher, or with a model that none of our nodes touched."""
    patcher = comfy.Patcher(patcher) if isinstance(patcher, torch.nn.Module) else patcher
    return comfy.sample(patcher, noise, words, **options)


class Counting(comfy.Wan):
    """Counts its forwards."""

    def __init__(self):
        super().__init__()
        self.ran = 0

    def forward_orig(self, *args):
        self.ran += 1
        return super().forward_orig(*args)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(("method", "options"), KEEP_ALL)
def test_settings_that_keep_every_tile_give_dense_attention(method, options, size):
    model = comfy.Wan(size=size)
    patcher = sparse(model, method, options)
    torch.testing.assert_close(run(patcher), run(model), rtol=1e-4, atol=1e-4)
    assert {forward.exact for forward in report(patcher).forwards[2:]} == {1.0}


@pytest.mark.parametrize(("method", "options"), [("sol", "beta = 1.0"), ("sparsed", "density = 0.4"), ("radial", "")])
@pytest.mark.parametrize("together", [True, False])
def test_steps_after_the_dense_ones_are_sparse_and_the_report_says_so(method, options, together):
    model, rows = comfy.Wan(), 1 if together else 2
    patcher = sparse(model, method, options)
    out, dense = run(patcher, together=together), run(model)
    assert not torch.allclose(out, dense, rtol=1e-3, atol=1e-3)
    forwards = report(patcher).forwards
    assert [forward.step for forward in forwards] == [step for step in range(6) for _ in range(rows)]
    assert all(forward.kind == "dense" and sum(forward.dense.values()) == 2 for forward in forwards[: 2 * rows])
    assert all(forward.planned == 2 and forward.exact < 1 for forward in forwards[2 * rows :])
    assert report(patcher).speedup is not None
    assert {forward.branch for forward in forwards} == ({"cond_uncond"} if together else {"cond", "uncond"})


def test_a_second_run_is_as_the_first_and_another_size_may_follow():
    patcher = sparse(comfy.Wan(), "sparsed", "density = 0.3")
    first = run(patcher)
    assert run(patcher, noise=NOISE[..., :6, :]).shape[3] == 6
    assert torch.equal(run(patcher), first)


def test_a_picture_keeps_its_text_exact():
    model = comfy.Flux()
    patcher = sparse(model, "sol", "beta = 8.0", dense_steps=0)
    noise = torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(run(patcher, noise), run(model, noise), rtol=1e-3, atol=1e-3)
    assert not report(patcher).problems
    tiles = -(-149 // 16)  # 5 of text behind 144: the last tile's row and column, a band of three, no more
    expected = (3 * tiles - 2 + 2 * (tiles - 2)) / tiles**2
    assert report(patcher).forwards[0].exact == pytest.approx(expected, abs=0.02)


def test_what_held_the_slot_gets_what_is_declined_as_it_came():
    seen = []

    def before(func, q, k, v, heads, *args, **kwargs):
        seen.append(k.shape[1])
        return func(q, k, v, heads, *args, **kwargs)

    model, outs = comfy.Wan(), []
    for held_first in (True, False):
        patcher = comfy.Patcher(model)
        if held_first:
            patcher.model_options["transformer_options"][comfy.SLOT] = before
        patcher = with_method(patcher, "sol", SMALL, "torch", dense_steps=0.5, min_tokens=1)
        if not held_first:
            patcher.model_options["transformer_options"][comfy.SLOT] = before
        seen.clear()
        outs.append(run(patcher))
        assert (seen.count(5), seen.count(96)) == (12, 6)
        assert patcher.model_options["transformer_options"][comfy.SLOT] is before
    assert torch.equal(*outs)


def test_a_model_is_not_changed_by_the_node():
    patcher = comfy.Patcher(comfy.Wan())
    new = with_method(patcher, "sol", "", "auto")
    assert not patcher.wrappers
    assert not patcher.model_options["transformer_options"]
    both = with_method(new, "easycache", "")
    assert [len(ones) for of in both.wrappers.values() for ones in of.values()] == [1, 1]
    assert [config.name for config in patch_of(both).configs] == ["sol", "easycache"]
    assert len(patch_of(new).configs) == 1
    assert patch_of(both).last is not patch_of(new).last


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("sol", "no_such = 1", "no_such"), ("sol", "beta = 'much'", "beta"), ("sol", "beta = ", "TOML"),
        ("nothing", "", "nothing"), ("sparsed", "density = 3.0", "density"), ("sol", "[radial]", "radial"),
        ("magcache", "", "ratios"),
    ],
)  # fmt: skip
def test_settings_that_are_refused_leave_the_model_dense_with_a_line_why(method, options, said):
    model = comfy.Wan()
    patcher = with_method(comfy.Patcher(model), method, options, "torch", min_tokens=1)
    assert torch.equal(run(patcher), run(model))
    (problem,) = report(patcher).problems
    assert said in problem
    assert "\n" not in problem


def test_a_method_that_another_excludes_is_left_out_and_the_other_acts():
    model = comfy.Wan()
    patcher = with_method(sparse(model), "sol", "beta = 3.0", "torch")
    assert torch.equal(run(patcher), run(sparse(model)))
    (problem,) = report(patcher).problems
    assert problem.startswith("sol ")


class Odd(comfy.Wan):
    patch_size = None


class Grabbing(comfy.Wan):
    """Takes the slot inside its forward and shares nothing."""

    def forward_orig(self, x, timestep, context, options):
        options[comfy.SLOT] = lambda func, *args, **kwargs: func(*args, **kwargs)
        return super().forward_orig(x, timestep, context, options)


class Elsewhere(comfy.Wan):
    """Runs its forward in another thread."""

    def forward(self, *args, **kwargs):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.inference_mode()(super().forward), *args, **kwargs).result()


class Bare(comfy.Wan):
    """Runs no wrapper."""

    def forward(self, *args, **kwargs):
        return self._forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("kind", "method", "noise", "said"),
    [
        (Grabbing, "sol", NOISE, "Grabbing"), (comfy.Flux, "radial", NOISE[:, :, 0], "radial"),
        (Elsewhere, "sol", NOISE, ""), (Bare, "sol", NOISE, "wrapper"),
    ],
)  # fmt: skip
def test_where_the_methods_can_not_act_the_model_stays_dense_with_a_line_why(kind, method, noise, said):
    """Or one refuses the sequence, which it says once."""
    model = kind()
    patcher = sparse(model, method, dense_steps=0)
    assert torch.equal(run(patcher, noise), run(model, noise))
    (problem,) = report(patcher).problems
    assert said in problem


@pytest.mark.parametrize(("kind", "text", "said"), [(Odd, 5, "patch_size"), (comfy.Wan, 96, "96")])
def test_tokens_that_no_grid_places_stay_dense(kind, text, said):
    """Text as long as the latents is not taken for them."""
    model, words = kind(), [torch.randn(1, text, 8)] * 2
    patcher = sparse(model, dense_steps=0)
    assert torch.equal(run(patcher, words=words), run(model, words=words))
    why, count = next(iter(report(patcher).forwards[0].dense.items()))
    assert said in why
    assert count >= 2


def test_blocks_that_are_left_out_begin_the_methods_anew(monkeypatch):
    forgotten = []
    monkeypatch.setattr(SparseDHandler, "reset", lambda self: forgotten.append(len(self.bits)) or self.bits.clear())

    class Shrinking(comfy.Wan):
        def forward_orig(self, x, timestep, context, options):
            blocks, self.blocks = self.blocks, self.blocks[1:] if timestep[0] < 0.5 else self.blocks
            try:
                return super().forward_orig(x, timestep, context, options)
            finally:
                self.blocks = blocks

    patcher = sparse(Shrinking(), "sparsed", "density = 0.3", dense_steps=0)
    run(patcher)
    assert any("anew" in note for note in report(patcher).notes)
    assert forgotten == [0, 2, 1]  # when the run began, when the first block left, and at the end


def test_an_error_of_the_model_goes_on_and_the_slot_is_left_as_it_was():
    class Failing(comfy.Wan):
        def forward_orig(self, x, timestep, context, options):
            raise RuntimeError("memory")

    patcher = sparse(Failing())
    with pytest.raises(RuntimeError, match="memory"):
        run(patcher)
    assert report(patcher) is not None


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("predictor", ["hold", "taylor"])
def test_every_other_step_is_forecast(together, predictor):
    model, rows = Counting(), 1 if together else 2
    patcher = with_method(comfy.Patcher(model), "staticcache", EVERY_OTHER, predictor=predictor)
    out = run(patcher, steps=8, together=together)
    kinds = [forward.kind for forward in report(patcher).forwards]
    assert kinds == [kind for kind in ("dense", "dense", *["skipped", "dense"] * 3) for _ in range(rows)]
    assert model.ran == 5 * rows
    assert not torch.equal(out, run(model, steps=8, together=together))


def test_the_speed_up_is_measured_against_the_run_s_own_dense_forwards_but_for_the_first():
    class Slow(Counting):
        def forward_orig(self, *args):
            time.sleep(0.02 if self.ran else 0.2)
            return super().forward_orig(*args)

    patcher = with_method(comfy.Patcher(Slow()), "staticcache", EVERY_OTHER)
    run(patcher, steps=8)
    assert 1.3 < report(patcher).speedup < 3  # 7 forwards, of which 4 ran
    assert report(patcher).dense_seconds < 0.15


def test_forwards_that_another_node_skips_are_told_apart():
    def theirs(executor, x, timestep, *args, **kwargs):
        return torch.zeros_like(x) if timestep[0] < 0.4 else executor(x, timestep, *args, **kwargs)

    patcher = sparse(Counting(), dense_steps=0)
    patcher.add_wrapper_with_key("diffusion_model", "theirs", theirs)
    run(patcher)
    forwards = [(forward.kind, forward.elsewhere) for forward in report(patcher).forwards]
    assert forwards == [("reduced", False)] * 4 + [("skipped", True)] * 2
    assert str(report(patcher)).count("another node") == 2


@pytest.mark.parametrize("method", ["easycache", "seacache"])
def test_a_threshold_decides_what_is_skipped(method):
    model = Counting()
    nothing, much = (
        with_method(comfy.Patcher(model), method, options, predictor="hold")
        for options in ("threshold = 0.0", "threshold = 100.0\nmax_consecutive = 2")
    )
    assert torch.equal(run(nothing), run(model))
    model.ran = 0
    run(much, steps=8)
    assert 4 <= model.ran < 8
    assert any("reused" in note for note in report(much).notes)


def test_a_sampler_that_calls_twice_a_step_is_cached_step_by_step():
    patcher = with_method(comfy.Patcher(Counting()), "staticcache", EVERY_OTHER)
    run(patcher, steps=8, calls=2)
    kinds = [forward.kind for forward in report(patcher).forwards]
    assert kinds[::2] == kinds[1::2]
    assert kinds.count("skipped") == 6


class Splitting(Counting):
    """Computes the two prompts one after the other from a step on."""

    def forward(self, x, timestep, context, transformer_options={}, **kwargs):  # noqa: B006
        if timestep[0] > 0.6 or len(x) == 1:
            return super().forward(x, timestep, context, transformer_options=transformer_options, **kwargs)
        parts = []
        for row in range(2):
            part = slice(row, row + 1)
            options = {**transformer_options, "uuids": transformer_options["uuids"][part], "cond_or_uncond": [row]}
            parts.append(super().forward(x[part], timestep[part], context[part], transformer_options=options))
        return torch.cat(parts)


def test_prompts_that_are_batched_otherwise_from_a_step_on_are_computed_anew():
    rarely = "every = 8\nwarmup_steps = 1\nlast_steps = 1"
    model = Counting()
    run(with_method(comfy.Patcher(model), "staticcache", rarely))
    assert model.ran == 2
    patcher = with_method(comfy.Patcher(Splitting()), "staticcache", rarely)
    run(patcher)
    ran = {forward.branch for forward in report(patcher).forwards if forward.kind == "dense"}
    assert ran == {"cond_uncond", "cond", "uncond"}


def test_video_and_sound_in_one_list_are_decided_by_the_video():
    engine = Run((EasyCache(threshold=0.5, warmup_steps=2, last_steps=1),), "torch")
    sigmas, video, sound = torch.linspace(1, 0, 7), torch.ones(1, 4, 2, 4, 4), torch.randn(1, 4, 9)
    ran, outs = [], []
    for step in range(6):
        options = {"sample_sigmas": sigmas, "sigmas": sigmas[step : step + 1], "uuids": ["a"], "cond_or_uncond": [0]}
        streams = [video * (1 + 0.01 * step), sound * 100**step]  # by the sound every step would have to be computed

        def forward(streams=streams, step=step):
            ran.append(step)
            return [streams[0] * 2, streams[1] * 3]

        with torch.inference_mode():
            outs.append(engine.forward(comfy.Wan(), forward, {"x": streams}, options))
    assert ran == [0, 1, 5]
    assert [[x.shape for x in out] for out in outs] == [[video.shape, sound.shape]] * 6


def test_a_cache_and_sparse_attention_act_together():
    patcher = with_method(comfy.Patcher(Counting()), "staticcache", EVERY_OTHER)
    patcher = with_method(patcher, "sol", SMALL, "torch", dense_steps=0.25, min_tokens=1)
    run(patcher, steps=8)
    kinds = [forward.kind for forward in report(patcher).forwards]
    assert kinds == ["dense", "dense", *["skipped", "reduced"] * 3]


def decayed(q, k, v, heads, trained, alpha, frames):
    """UltraViCo by its formula: centred keys, logits x of far frames become min(x, alpha x)."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2).double() for x in (q, k, v))
    logits = q @ (k - k.mean(2, keepdim=True)).mT / q.shape[-1] ** 0.5
    frame = torch.arange(frames).repeat_interleave(q.shape[2] // frames)
    far = (frame[:, None] - frame).abs() > trained / 2
    logits = torch.where(far, torch.minimum(logits, alpha * logits), logits)
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2).float()


class ByFormula(comfy.Wan):
    def forward_orig(self, x, timestep, context, options):
        def override(func, q, k, v, heads, **kwargs):
            own = q.shape[1] == k.shape[1]
            return decayed(q, k, v, heads, 3, 0.5, 6) if own else func(q, k, v, heads, **kwargs)

        return super().forward_orig(x, timestep, context, {**options, comfy.SLOT: override})


def test_a_clip_longer_than_trained_decays_by_the_frames_of_the_grid_beside_sparse_attention_too():
    model = comfy.Wan()
    patcher = with_method(comfy.Patcher(model), "ultravico", "alpha = 0.5", "torch", trained_frames=3)
    out = run(patcher)
    torch.testing.assert_close(out, run(ByFormula()), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(out, run(model), rtol=1e-3, atol=1e-3)
    both = with_method(patcher, "sol", f"{SMALL}\nbeta = -8.0\ndense_steps = 0", "torch")
    torch.testing.assert_close(out, run(both), rtol=1e-4, atol=1e-4)
    assert report(both).forwards[0].planned == 2


@pytest.mark.parametrize("method", ["ultravico", "lvsa"])
def test_a_clip_no_longer_than_trained_is_left_as_it_is(method):
    model = comfy.Wan()
    assert torch.equal(run(with_method(comfy.Patcher(model), method, "", "torch", trained_frames=6)), run(model))
