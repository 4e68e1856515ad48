"""Steps and noise levels, read off timesteps and schedulers; which pipeline runs; and shares of its run."""

import math
import sys
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace

import diffusers
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_stock import stock_pipeline

import dit_accel
from dit_accel import ConfigError
from dit_accel.attachment.steps import Course, Schedule, Timeline, current_run, noise_level, timeline_of
from dit_accel.methods.attention.dfa import DFA
from dit_accel.methods.attention.sparse import SparseConfig
from dit_accel.methods.caches.cache_config import StepCacheConfig
from dit_accel.methods.registry import methods
from dit_accel.rules.steps import is_short, steps_of, whole_steps, window


def after(scheduler, steps: int = 4, **found):
    """A pipeline that has laid out a run of so many steps."""
    scheduler.set_timesteps(steps)
    return SimpleNamespace(scheduler=scheduler, **found)


def test_the_noisiest_frame_tells_whether_a_run_goes_on_or_back_whichever_way_timesteps_go():
    for timesteps, moved, noisiest in (
        ([1000, 900, 900, 100], [0, 1, 0, 1], (100,)),
        ([0.0, 0.1, 0.6, 0.0], [0, 1, 1, -1], (0,)),  # the model's rise
        ([900, 500, 700, 600], [0, 1, -1, 1], (600,)),
        ([[0, 700], [0, 600], [0, 100]], [0, 1, 1], (100,)),  # a given frame, which has no noise
        ([[0.0, 1.0], [0.5, 1.0], [0.8, 1.0]], [0, 1, 1], (0.8,)),
        ([[990, 1000, 1000], [970, 990, 1000], [500, 600, 900]], [0, 0, 1], (900,)),  # frame after frame
        ([999, 832.5007, 832.5, 666, 666.0001, 665.8], [0, 1, 0, 1, 0, 1], (665.8,)),  # one more, off by rounding
        ([[0, 700]], [0], (0, 700)),
    ):
        course = Course()
        assert course.noisiest == ()
        assert [course.move(torch.tensor(one)) for one in timesteps] == moved
        assert course.noisiest == pytest.approx(noisiest)


def test_the_noise_level_is_that_of_the_coming_step():
    for scheduler in (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), diffusers.HeunDiscreteScheduler()):
        scheduler.set_timesteps(4)
        sample = torch.ones(1, 1, 2, 2)
        for index, timestep in enumerate(scheduler.timesteps):
            assert noise_level(scheduler) == float(scheduler.sigmas[index])
            sample = scheduler.step(sample * 0.1, timestep, sample).prev_sample
        scheduler.set_timesteps(4)
        assert noise_level(scheduler) == float(scheduler.sigmas[0])
        scheduler.set_begin_index(2)  # as a later start has it
        assert noise_level(scheduler) == float(scheduler.sigmas[2])


def test_a_run_has_the_steps_that_were_asked_for():
    """Schedulers of second order evaluate the model more often: twice at a timestep, or between two of them."""
    for scheduler, timeline in (
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), Timeline(steps=4)),
        (diffusers.DDIMScheduler(), Timeline(steps=4)),
        (diffusers.UniPCMultistepScheduler(), Timeline(steps=4)),
        (diffusers.HeunDiscreteScheduler(), Timeline(steps=4, repeats=True)),
        (diffusers.KDPM2DiscreteScheduler(), Timeline(steps=4, halves=True)),
        (diffusers.KDPM2AncestralDiscreteScheduler(), Timeline(steps=4, repeats=True)),
    ):
        pipe = after(scheduler)
        assert timeline_of(pipe) == timeline
        course, number, steps = Course(), 0, []
        for timestep in scheduler.timesteps:
            number += course.move(timestep)
            steps.append(timeline.step_of(number))
        assert steps == sorted(steps)
        assert set(steps) == {0, 1, 2, 3}
        assert timeline_of(after(scheduler, 7)).steps == 7  # where a pair of timesteps may differ by rounding


def test_a_run_that_starts_in_the_middle_has_the_steps_that_are_left():
    flow, heun = diffusers.FlowMatchEulerDiscreteScheduler(), diffusers.HeunDiscreteScheduler()
    assert timeline_of(after(flow, 10, _num_timesteps=6)).steps == 6
    assert timeline_of(after(flow, 10, _num_timesteps=11)).steps == 10  # another run's
    assert timeline_of(after(heun, 10, _num_timesteps=7)) == Timeline(steps=4, repeats=True)  # of 19
    flow.set_begin_index(3)
    assert timeline_of(SimpleNamespace(scheduler=flow)).steps == 7
    schedule, levels = Schedule(flow, 3), [float(one) for one in flow.sigmas]
    assert [Schedule(None).is_over(0), *map(schedule.is_over, (0, 5, 6))] == [True, False, False, True]
    assert (schedule.number(), [schedule.sigma(number) for number in (0, 6, 7)]) == (None, [levels[3], levels[9], None])
    for flow._step_index, number in ((2, None), (3, 0), (9, 6), (10, None)):
        assert (schedule.number(), schedule.sigma(0)) == (number, levels[3] if number is None else levels[3 + number])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, None])
@pytest.mark.parametrize("start", [0, 3])
def test_a_forwards_timestep_is_found_among_those_of_the_scheduler_however_a_pipeline_scales_it(dtype, start):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    scales = [lambda t: t, lambda t: 1000 - t, lambda t: t / 1000, lambda t: 1 - t / 1000]
    for scaled in scales[:2] if dtype is torch.int64 else scales:
        schedule, values = Schedule(scheduler), [scaled(timestep) for timestep in scheduler.timesteps[start:]]
        places = [
            schedule.follow((float(value if dtype is None else value.to(dtype)),), dtype, number)
            for number, value in enumerate(values)
        ]
        assert places == [(start, place) for place in range(start, 8)]
    assert schedule.timeline(start).steps == 8 - start
    assert schedule.noise_level(start) == float(scheduler.sigmas[start])


def test_a_run_that_leaves_the_schedulers_list_does_not_follow_it():
    scheduler = diffusers.DDIMScheduler()
    assert Schedule(scheduler).follow((999.0,), None, 0) is None  # it lists all, before any steps were asked for
    scheduler.set_timesteps(4)
    schedule = Schedule(scheduler)
    assert [schedule.follow((value,), None, number) for number, value in enumerate((750.0, 500.0))] == [(0, 0), (0, 1)]
    assert schedule.follow((200.0,), None, 2) is None
    assert schedule.follow((0.0,), None, 3) is None  # once left, it is not taken up again
    skipping = Schedule(scheduler)
    assert skipping.follow((750.0,), None, 0) == (0, 0)
    assert skipping.follow((250.0,), None, 1) is None
    assert Schedule(None).follow((750.0,), None, 0) is None
    assert Schedule(SimpleNamespace(timesteps=[1000.0, 500.0, 1.0])).follow((0.999995,), None, 0) == (2, 2)
    assert len(Schedule(SimpleNamespace(timesteps=[3, 2, 1]))) == 3  # no tensor


def test_twice_the_same_timestep_is_one_step():
    scheduler = diffusers.HeunDiscreteScheduler()
    scheduler.set_timesteps(4)
    schedule = Schedule(scheduler)
    assert schedule.timeline(0) == Timeline(steps=4, repeats=True)
    different = list(dict.fromkeys(scheduler.timesteps.tolist()))
    places = [schedule.follow((value,), None, number) for number, value in enumerate(different)]
    assert places == [(0, 0), (0, 1), (0, 3), (0, 5)]
    assert [schedule.noise_level(place) for _, place in places] == scheduler.sigmas[[0, 1, 3, 5]].tolist()


def test_what_nothing_tells_is_unknown():
    assert noise_level(None) is None
    assert noise_level(diffusers.DDIMScheduler()) is None
    assert noise_level(SimpleNamespace(sigmas=torch.ones(2), step_index=2)) is None
    for parts in ({}, {"scheduler": None}, {"scheduler": SimpleNamespace(timesteps=torch.zeros(0))}):
        assert timeline_of(SimpleNamespace(**parts)) == Timeline()
    assert Schedule(None).timeline(0).steps == 0


# Which pipeline runs a forward.


def test_a_modular_pipeline_is_found_too():
    modular, call = stock_pipeline("MiniMaxH3ModularPipeline")
    transformer, pipes = modular.components["transformer"], []
    with dit_accel.attach(transformer, preset="none") as attachment:
        handle = transformer.register_forward_hook(lambda *_: pipes.append(current_run(transformer).pipe))
        modular(**call)
        handle.remove()
        assert set(map(id, pipes)) == {id(modular.pipe)}
        assert attachment.denoising.num_inference_steps == len(pipes)


def test_a_run_goes_on_until_its_call_returns():
    pipe, call = stock_pipeline("FluxPipeline")
    runs = []

    def look(*_):
        runs.append(current_run(pipe.transformer))
        assert runs[-1].goes_on()
        assert runs[-1].is_same(runs[0])

    assert current_run(pipe.transformer) is None
    handle = pipe.transformer.register_forward_hook(look)
    pipe(**call | {"output_type": "latent", "num_inference_steps": 2})
    handle.remove()
    assert len(runs) == 2
    assert runs[0].pipe is pipe
    assert not runs[0].goes_on()
    assert not runs[0].is_same(None)


def test_a_run_is_the_pipelines_call_not_a_method_of_it_further_in():
    pipe, _ = stock_pipeline("FluxPipeline")
    frames = []

    class Outer(type(pipe)):
        def __call__(self):
            frames.append(id(sys._getframe()))
            self.denoise()

        def denoise(self):
            frames.append(current_run(self.transformer).frame)

    Outer(**pipe.components)()
    assert frames[0] == frames[1]


# Shares of a run: a number of steps, or a share below 1, is rounded and checked alike in every method.

HUNDREDTHS = st.integers(1, 99)
COUNTS = st.integers(1, 1000)


def ends_of(config: type) -> tuple[str, str]:
    """The options of a method that count a run's first and last steps."""
    return ("dense_steps", "dense_last_steps") if issubclass(config, SparseConfig) else ("warmup_steps", "last_steps")


ENDS = {name: config for name, config in methods().items() if set(ends_of(config)) <= set(config.__dataclass_fields__)}
"""The methods that leave a run's first and last steps alone."""


def kept(config: type, first: int | float, last: int | float, count: int | None) -> list[int]:
    """The steps of a run that a method leaves alone at its ends; of one of unknown length, whether the first is."""
    before, after = ends_of(config)
    settings, steps = config(**{before: first, after: last}), range(count or 1)
    if issubclass(config, SparseConfig):
        settings = settings.filled({"dense_layers": 0}).filled()
        return [step for step in steps if settings.is_dense(step, count, 10**6, 0.0)]
    if issubclass(config, DFA):
        return [step for step in steps if settings.at_an_end(step, count)]
    computed = [StepCacheConfig.always_computed(settings, step, count) for step in steps]
    return [step for step, why in enumerate(computed) if why in ("first steps", "last steps")]


@given(HUNDREDTHS, st.floats(0, 1), COUNTS)
def test_a_share_is_rounded_up_and_hundredths_are_taken_as_they_are_written(hundredths, share, count):
    exact = math.ceil(Fraction(hundredths, 100) * count)
    assert steps_of(hundredths / 100, count) == whole_steps(hundredths / 100, count) == exact
    exact = Fraction(Decimal(share)) * count
    assert 0 <= steps_of(share, count) <= count
    assert -1e-9 <= steps_of(share, count) - exact < 1 or steps_of(share, count) == math.ceil(exact)


def test_all_methods_round_alike():
    for config in ENDS.values():
        for share, count, steps in ((0.28, 25, 7), (0.28, 50, 14), (0.07, 100, 7), (0.55, 100, 55)):
            assert kept(config, share, 0, count) == list(range(steps))
            assert kept(config, 0, share, count) == list(range(count - steps, count))
        assert kept(config, 2, 3, 8) == [0, 1, 5, 6, 7]
        assert kept(config, 1, 1.0, 4) == [0, 3]
        assert kept(config, 0, 0, 4) == []
        assert kept(config, 9, 0, 4) == [0, 1, 2, 3]


def test_shares_and_last_steps_of_a_run_of_unknown_length_are_refused():
    for name, config in ENDS.items():
        before, after = ends_of(config)
        assert kept(config, 2, 0, None) == [0]  # whole first steps alone need no count
        for first, last in ((0.5, 0), (0, 1), (0, 0.5), (3, 2)):
            option, value = (after, last) if last else (before, first)
            with pytest.raises(ConfigError, match=rf"^{name}\.{option} = {value} "):
                kept(config, first, last, None)


@given(st.integers(0, 98), st.integers(1, 100), COUNTS)
@example(1, 19, 8)  # empty in diffusers' guiders
@example(7, 93, 100)
@example(3, 1, 100)  # of one step: not short
def test_windows_by_exact_fractions(start, length, count):
    stop = min(start + length, 100)
    low, high = Fraction(start, 100), Fraction(stop, 100)
    inside = [step for step in range(count) if low <= Fraction(step, count) < high]
    found = list(window(start / 100, stop / 100, count))
    if inside:
        assert found == inside
    else:
        assert found == [min(math.ceil(low * count), count - 1)]
    assert is_short(start / 100, stop / 100, count) == ((high - low) * count < 1)
    assert inside or is_short(start / 100, stop / 100, count)
