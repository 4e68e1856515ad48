"""Loops written by hand around a transformer: which run, step and branch each forward is of."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from wan_tiny import tiny_transformer

import dit_accel
from dit_accel import ConfigError, LiteAttention, RadialAttention, StaticCache
from dit_accel.adapters.installed import adapters
from dit_accel.attachment.layers import Calls, RememberedTensors, TransformerState, text_in

LITE = LiteAttention(block_size=16, target_density=0.5, dense_steps=0)
TEXTS = {"cond": 1, "uncond": 2}


@pytest.fixture(scope="module")
def transformer():
    return tiny_transformer()


def noise(seed=0, *shape):
    return torch.randn(*(shape or (1, 12, 5, 8, 8)), generator=torch.Generator().manual_seed(seed))


def text(branch):
    return 3 * noise(TEXTS[branch], 1, 6, 64)


def loop(
    transformer, order=("cond", "uncond"), steps=8, guided=8, seed=0, named=False, anew=False, timesteps=None,
    stop=None, fields=(),
):  # fmt: skip
    """Denoise, and return what each step's forwards gave by branch; guidance ends after ``guided`` steps.

    With ``named``, contexts tell the branch, and of the step the ``fields``. The loop is broken off after ``stop``
    forwards.
    """
    x, texts, outs, count = noise(seed), {name: text(name) for name in order}, [], 0
    timesteps = [1000.0 - 100 * step for step in range(steps)] if timesteps is None else timesteps
    for step, timestep in enumerate(timesteps):
        told = dict(step_index=step, num_inference_steps=len(timesteps), sigma=float(timestep) / 1000)
        told = {name: told[name] for name in fields}
        found = {}
        for name in order if step < guided else ("cond",):
            if count == stop:
                return outs
            count += 1
            given = texts[name].clone() if anew else texts[name]
            with torch.no_grad(), transformer.cache_context(name, **told) if named else torch.no_grad():
                found[name] = transformer(x, torch.tensor([float(timestep)]), given, return_dict=False)[0]
        outs.append(found)
        x = x - 0.02 * sum(found.values()) / len(found)
    return outs


def same(one, other):
    return len(one) == len(other) and all(
        set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(one, other, strict=True)
    )


def test_the_branch_that_is_left_when_guidance_ends_keeps_its_own_history(transformer):
    """As in a loop whose contexts name the branches: the cond-only step is forecast from the cond outputs."""
    cache = StaticCache(every=6, warmup_steps=1, last_steps=0)
    for order in (("cond", "uncond"), ("uncond", "cond")):
        with dit_accel.attach(transformer, cache):
            named = loop(transformer, order, guided=5, named=True)
        for anew in (False, True):
            with dit_accel.attach(transformer, cache) as attachment:
                assert same(loop(transformer, order, guided=5, anew=anew), named)
                assert attachment.report().section("staticcache").data["reused"] > 0
        assert same(named[:1], loop(transformer, order, guided=5)[:1])


def test_a_text_that_may_be_another_branchs_makes_no_forecast(transformer):
    """Guidance that begins later, the unconditional forward first: it must not get the conditional one's output."""
    texts = {name: text(name) for name in TEXTS}
    cache = StaticCache(every=6, warmup_steps=1, last_steps=0)

    def forwards():
        x, outs = noise(), []
        for step in range(5):
            for name in ("cond",) if step < 3 else ("uncond", "cond"):
                with torch.no_grad():
                    out = transformer(x, torch.tensor([1000.0 - 100 * step]), texts[name], return_dict=False)[0]
                outs.append(out)
        return outs

    plain = forwards()
    with dit_accel.attach(transformer, cache) as attachment:
        cached = forwards()
        assert attachment.report().section("staticcache").data["reused"] == 4
    torch.testing.assert_close(cached[1], plain[0])  # skipped
    assert torch.equal(cached[3], plain[3])  # step 3, uncond
    assert torch.equal(cached[4], plain[4])


def test_after_a_forward_that_raised_the_next_one_begins_a_run(transformer, monkeypatch):
    with dit_accel.attach(transformer, LITE):
        fresh = loop(transformer, seed=1)
    for stop in (1, 3):
        with dit_accel.attach(transformer, LITE) as attachment:
            loop(transformer, stop=stop)
            with pytest.raises(RuntimeError, match="mat1 and mat2"), torch.no_grad():
                transformer(noise(), torch.tensor([1000.0 - 100 * (stop // 2)]), noise(9, 1, 6, 63))
            assert same(loop(transformer, seed=1), fresh)
            assert attachment.denoising.step_index == 7


def test_a_named_call_that_comes_again_in_the_first_step_begins_a_run(transformer):
    for fields in ((), ("step_index",), ("step_index", "num_inference_steps", "sigma")):
        with dit_accel.attach(transformer, LITE):
            fresh = loop(transformer, seed=1, named=True, fields=fields)
        with dit_accel.attach(transformer, LITE) as attachment:
            for stop in (1, 2):
                loop(transformer, named=True, stop=stop, fields=fields)
                assert same(loop(transformer, seed=1, named=True, fields=fields), fresh)
            assert len(attachment.report().steps) == 16


def test_a_loop_broken_off_in_its_first_step_is_told_of_where_calls_have_no_names_and_reset_ends_it(transformer):
    with dit_accel.attach(transformer, LITE):
        fresh = loop(transformer, seed=1)
    with dit_accel.attach(transformer, LITE) as attachment:
        loop(transformer, stop=1)
        attachment.reset()
        assert same(loop(transformer, seed=1), fresh)
        loop(transformer, stop=3)  # broken off later: the timestep rises
        assert same(loop(transformer, seed=1), fresh)
        loop(transformer, stop=1)
        with pytest.warns(UserWarning, match=r"transformer.*first step.*attachment\.reset\(\)"):
            loop(transformer, seed=1, steps=1)
    with dit_accel.attach(transformer, LITE), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")  # two calls with one text and one noise are no cause to warn
        for step in (0, 0, 1, 1):
            transformer(noise() + step, torch.tensor([900.0 - step]), text("cond"))


class Loop:
    """A pipeline whose loop is written by hand: diffusers' base class is not in it, and its scheduler is its own."""

    def __init__(self, transformer):
        self.transformer = transformer
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)

    @property
    def components(self):
        return {"transformer": self.transformer, "scheduler": self.scheduler}


def steps_seen(attachment):
    return [(step.step_index, step.branch) for step in attachment.report().steps]


def test_a_loop_over_the_attached_pipelines_scheduler_has_its_steps_and_noise_levels(transformer):
    pipe = Loop(transformer)
    pipe._num_timesteps = 3  # of a call of the pipeline: nobody's steps here
    with dit_accel.attach(pipe, preset="none") as attachment:
        state = attachment.denoising
        for steps, start in ((6, 0), (4, 0), (5, 2)):
            pipe.scheduler.set_timesteps(steps)
            loop(transformer, timesteps=pipe.scheduler.timesteps[start:])
            assert state.num_inference_steps == steps - start
            assert steps_seen(attachment)[-1] == (steps - start - 1, "call 1")
            assert state.sigma == float(pipe.scheduler.sigmas[steps - 1])


def test_a_loop_that_does_not_follow_the_attached_pipelines_scheduler_has_no_number_of_steps(transformer):
    pipe = Loop(transformer)
    pipe.scheduler.set_timesteps(4)
    with dit_accel.attach(pipe, preset="none") as attachment:
        state = attachment.denoising
        loop(transformer, timesteps=[1000.0, 700.0, 400.0, 100.0])
        assert (state.num_inference_steps, state.sigma, state.step_index) == (None, None, 3)
    shares = RadialAttention(block_size=16, dense_steps=0.3, dense_layers=0)
    with (
        dit_accel.attach(pipe, shares),
        pytest.raises(ConfigError, match=r"radial\.dense_steps = 0\.3"),
    ):
        loop(transformer, timesteps=[950.0, 700.0, 400.0, 100.0])


def test_what_a_context_tells_is_believed_and_what_it_leaves_open_inferred(transformer):
    pipe = Loop(transformer)
    pipe.scheduler.set_timesteps(6)
    with dit_accel.attach(pipe, preset="none") as attachment:
        state = attachment.denoising
        timesteps = pipe.scheduler.timesteps
        loop(transformer, named=True, timesteps=timesteps, fields=("step_index",))
        assert (state.step_index, state.num_inference_steps) == (5, 6)
        assert state.sigma == float(pipe.scheduler.sigmas[5])
        loop(transformer, named=True, timesteps=timesteps, fields=("num_inference_steps", "sigma"))
        assert (state.step_index, state.num_inference_steps, state.sigma) == (5, 6, float(timesteps[5]) / 1000)
    with dit_accel.attach(transformer, preset="none") as attachment, torch.no_grad():
        state = attachment.denoising
        with transformer.cache_context("cond", num_inference_steps=9, sigma=0.5, timestep=None):
            transformer(noise(), torch.tensor([500.0]), text("cond"))
        assert (state.step_index, state.num_inference_steps, state.sigma) == (0, 9, 0.5)
    pipe = SimpleNamespace(components={"transformer": transformer}, transformer=transformer)  # without a scheduler
    with dit_accel.attach(pipe, preset="none") as attachment:
        loop(transformer, steps=2)
        assert attachment.denoising.num_inference_steps is None


COND, UNCOND, OTHER = (torch.randn(1, 4, 8) for _ in range(3))


def numbered(*steps, repeats=False):
    """The numbers of the calls of some steps, by the texts they hold; a star where all is dropped before."""
    calls, found = Calls(), []
    for step, texts in enumerate(steps):
        numbers = [calls.number(step, (text,) if text is not None else (), repeats) for text in texts]
        found.append(" ".join(f"{number}{'*' * lost}" for number, lost in numbers))
    return found


@pytest.mark.parametrize("order", [(COND, UNCOND), (UNCOND, COND)], ids=["cond first", "uncond first"])
def test_a_branch_keeps_its_number_when_guidance_ends_and_begins_again(order):
    cond = str([one is COND for one in order].index(True))
    assert numbered(order, order, [COND], [COND], order, order[::-1]) == ["0 1", "0 1", cond, cond, "0 1", "1 0"]


def test_a_branch_that_begins_later_is_a_further_one():
    assert numbered([COND], [COND, UNCOND], [COND, UNCOND]) == ["0", "0 1", "0 1"]
    # first in its step it may be the other one, with another text: nothing that was learned is used
    assert numbered([COND], [UNCOND, COND], [UNCOND, COND], [COND]) == ["0", "0* 1", "0 1", "1"]


def test_equal_texts_are_branches_by_their_order():
    assert numbered([COND, COND], [COND, COND], [COND]) == ["0 1", "0 1", "0"]
    assert numbered([COND, UNCOND] * 3, [COND, UNCOND] * 3) == ["0 1 2 3 4 5"] * 2  # windows of one picture


def test_a_scheduler_that_evaluates_twice_comes_to_the_same_branches_again():
    assert numbered([UNCOND, COND], [UNCOND, COND] * 2, [COND] * 2, repeats=True) == ["0 1", "0 1 0 1", "1 1"]
    assert numbered([COND, COND], [COND] * 4, repeats=True) == ["0 1", "0 1 0 1"]


def test_texts_made_anew_are_told_by_their_values():
    steps = [[UNCOND.clone(), COND.clone()], [UNCOND.clone(), COND.clone()], [COND.clone()]]
    assert numbered(*steps) == ["0 1", "0 1", "1"]
    embeds = torch.cat([UNCOND, COND])
    assert numbered(*([embeds[:1], embeds[1:]] for _ in range(3)), [embeds[1:]]) == ["0 1"] * 3 + ["1"]
    with torch.inference_mode():
        assert numbered([UNCOND.clone(), COND.clone()], [COND.clone(), UNCOND.clone()]) == ["0 1", "1 0"]


def test_a_text_that_changes_drops_what_was_learned_before_its_forward():
    assert numbered(*([torch.randn(1, 4, 8)] for _ in range(3))) == ["0", "0*", "0*"]
    assert numbered([COND, UNCOND], [COND, OTHER], [COND, OTHER]) == ["0 1", "0 1*", "0 1"]
    calls = Calls()
    for step in range(50):
        calls.number(step, (torch.randn(1, 4, 8),), False)
    assert len(calls._texts) == len(calls._known) == 1  # nothing piles up


def test_without_texts_the_place_tells_and_a_change_of_their_number_drops_what_was_learned():
    assert numbered(*([None] * count for count in (2, 2, 1, 1))) == ["0 1", "0 1", "0", "0*"]


def test_tensors_are_recognised_by_memory_or_values():
    base = torch.arange(8.0).reshape(2, 4)
    held = RememberedTensors((base[0],))
    assert held.is_unchanged_memory((base[0],))
    assert not held.is_unchanged_memory((base[1],))
    assert not held.is_unchanged_memory((base[0].clone(),))
    assert held.has_values((base[0].clone(),))
    assert not held.has_values((base[0].double(),))
    assert not held.has_values((base[0], base[0]))
    base[1] += 1  # a view's version is that of the whole
    assert not held.is_unchanged_memory((base[0],))
    meta = torch.empty(3, device="meta")
    assert not RememberedTensors((meta,)).is_unchanged_memory((meta,))


def test_the_text_is_the_input_that_the_adapter_names():
    def adapter(**fields):
        return SimpleNamespace(
            **{"cross_attention": None, "joined_text": "no text of its own", "latents": "x", "timestep": "t", **fields}
        )

    inputs = {"x": COND, "t": torch.ones(1), "encoder_hidden_states": UNCOND, "caption": OTHER, "flag": True}
    assert text_in(adapter(), inputs) == (UNCOND,)
    assert text_in(adapter(joined_text=SimpleNamespace(text="caption")), inputs) == (OTHER,)
    assert text_in(adapter(cross_attention=SimpleNamespace(text="missing")), inputs) == (UNCOND,)
    inputs = {"x": COND, "t": torch.ones(1), "features": [OTHER, UNCOND], "mask": None}
    assert text_in(adapter(), inputs) == (OTHER, UNCOND)
    assert text_in(adapter(), {"x": COND}) == ()


def test_calls_are_numbered_and_those_of_a_prompt_s_own_transformer_after_it():
    wan = TransformerState("transformer", torch.nn.Identity(), adapters()["wan"])
    own = TransformerState("unconditional_transformer", torch.nn.Identity(), adapters()["ideogram4"])
    names = []
    for wan.calls in range(2):
        own.calls = wan.calls
        names += [wan.branch, own.branch]
    assert names == ["call 0", "uncond", "call 1", "uncond 1"]
