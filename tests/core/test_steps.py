"""Steps and noise levels, read off timesteps and schedulers; and which pipeline it is that runs."""

import sys
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    UniPCMultistepScheduler,
)
from tiny_parts import picture
from tiny_stock import stock_pipeline
from wan_tiny import tiny_transformer

import dit_accel
from dit_accel.attachment.steps import Course, Schedule, Timeline, current_run, noise_level, timeline_of


def after(scheduler, steps: int = 4, **found):
    """A pipeline that has laid out a run of so many steps."""
    scheduler.set_timesteps(steps)
    return SimpleNamespace(scheduler=scheduler, **found)


@pytest.mark.parametrize(
    ("timesteps", "moved", "noisiest"),
    [
        ([1000, 900, 900, 100], [0, 1, 0, 1], (100,)),
        ([0.0, 0.1, 0.6, 0.0], [0, 1, 1, -1], (0,)),  # the model's rise
        ([900, 500, 700, 600], [0, 1, -1, 1], (600,)),
        ([[0, 700], [0, 600], [0, 100]], [0, 1, 1], (100,)),  # a given frame, which has no noise
        ([[0.0, 1.0], [0.5, 1.0], [0.8, 1.0]], [0, 1, 1], (0.8,)),
        ([[990, 1000, 1000], [970, 990, 1000], [500, 600, 900]], [0, 0, 1], (900,)),  # frame after frame
        ([999.0, 832.5007, 832.5, 666.0, 666.0001], [0, 1, 0, 1, 0], (666,)),  # a second evaluation, off by rounding
        ([[0, 700]], [0], (0, 700)),
    ],
)
def test_the_noisiest_frame_tells_whether_a_run_goes_on_or_back_whichever_way_timesteps_go(timesteps, moved, noisiest):
    course = Course()
    assert course.noisiest == ()
    assert [course.move(torch.tensor(one)) for one in timesteps] == moved
    assert course.noisiest == pytest.approx(noisiest)


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(shift=3.0), HeunDiscreteScheduler()])
def test_the_noise_level_is_that_of_the_coming_step(scheduler):
    scheduler.set_timesteps(4)
    sample = torch.ones(1, 1, 2, 2)
    for index, timestep in enumerate(scheduler.timesteps):
        assert noise_level(scheduler) == float(scheduler.sigmas[index])
        sample = scheduler.step(sample * 0.1, timestep, sample).prev_sample
    scheduler.set_timesteps(4)
    assert noise_level(scheduler) == float(scheduler.sigmas[0])


def test_a_later_start_begins_at_its_own_noise():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    assert noise_level(scheduler) == float(scheduler.sigmas[2])


@pytest.mark.parametrize(
    ("scheduler", "timeline"),
    [
        (FlowMatchEulerDiscreteScheduler(shift=3.0), Timeline(steps=4)),
        (DDIMScheduler(), Timeline(steps=4)),
        (UniPCMultistepScheduler(), Timeline(steps=4)),
        (HeunDiscreteScheduler(), Timeline(steps=4, repeats=True)),
        (KDPM2DiscreteScheduler(), Timeline(steps=4, halves=True)),
        (KDPM2AncestralDiscreteScheduler(), Timeline(steps=4, repeats=True)),
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_run_has_the_steps_that_were_asked_for(scheduler, timeline):
    """Schedulers of second order evaluate the model more often: twice at a timestep, or between two of them."""
    pipe = after(scheduler)
    assert timeline_of(pipe) == timeline
    course, number, steps = Course(), 0, []
    for timestep in scheduler.timesteps:
        number += course.move(timestep)
        steps.append(timeline.step_of(number))
    assert steps == sorted(steps)
    assert set(steps) == {0, 1, 2, 3}


@pytest.mark.parametrize("steps", [7, 25])
def test_a_pair_of_timesteps_that_differs_by_rounding_is_one_step(steps):
    assert timeline_of(after(KDPM2AncestralDiscreteScheduler(), steps)).steps == steps


def test_a_run_that_starts_in_the_middle_has_the_steps_that_are_left():
    assert timeline_of(after(FlowMatchEulerDiscreteScheduler(), 10, _num_timesteps=6)).steps == 6
    later = after(FlowMatchEulerDiscreteScheduler(), 10)
    later.scheduler.set_begin_index(3)
    assert timeline_of(later).steps == 7
    assert timeline_of(after(FlowMatchEulerDiscreteScheduler(), 10, _num_timesteps=11)).steps == 10  # another run's
    heun = after(HeunDiscreteScheduler(), 10)
    heun._num_timesteps = 7  # of 19
    assert timeline_of(heun) == Timeline(steps=4, repeats=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, None])
@pytest.mark.parametrize("start", [0, 3])
def test_a_forwards_timestep_is_found_among_those_of_the_scheduler_however_a_pipeline_scales_it(dtype, start):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    schedule = Schedule(scheduler)
    scales = [lambda t: t, lambda t: 1000 - t]
    if dtype is not torch.int64:
        scales += [lambda t: t / 1000, lambda t: 1 - t / 1000]
    for scaled in scales:
        schedule, places = Schedule(scheduler), []
        for number, timestep in enumerate(scheduler.timesteps[start:]):
            given = scaled(timestep) if dtype is None else scaled(timestep).to(dtype)
            places.append(schedule.follow((float(given),), dtype, number))
        assert places == [(start, place) for place in range(start, 8)]
    assert schedule.timeline(start).steps == 8 - start
    assert schedule.noise_level(start) == float(scheduler.sigmas[start])


def test_a_run_that_leaves_the_schedulers_list_does_not_follow_it():
    scheduler = DDIMScheduler()
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
    assert len(Schedule(SimpleNamespace(timesteps=[3, 2, 1]))) == 3  # no tensor


def test_twice_the_same_timestep_is_one_step():
    scheduler = HeunDiscreteScheduler()
    scheduler.set_timesteps(4)
    schedule = Schedule(scheduler)
    assert schedule.timeline(0) == Timeline(steps=4, repeats=True)
    different = list(dict.fromkeys(scheduler.timesteps.tolist()))
    places = [schedule.follow((value,), None, number) for number, value in enumerate(different)]
    assert places == [(0, 0), (0, 1), (0, 3), (0, 5)]
    assert [schedule.noise_level(place) for _, place in places] == scheduler.sigmas[[0, 1, 3, 5]].tolist()


def test_what_nothing_tells_is_unknown():
    assert noise_level(None) is None
    assert noise_level(DDIMScheduler()) is None
    assert noise_level(SimpleNamespace(sigmas=torch.ones(2), step_index=2)) is None
    for parts in ({}, {"scheduler": None}, {"scheduler": SimpleNamespace(timesteps=torch.zeros(0))}):
        assert timeline_of(SimpleNamespace(**parts)) == Timeline()
    assert Schedule(None).timeline(0).steps == 0


# Which pipeline runs a forward, where several share a transformer.


@pytest.fixture
def seen(monkeypatch):
    """Collect what `site.running` gives in each forward of an attachment."""
    pipes = []

    def follow(attachment, transformer):
        state, forward = attachment.engine.layers[0].state, attachment.engine.forward
        begin = forward.begin

        def noting(batch):
            pipes.append(state.running)
            return begin(batch)

        monkeypatch.setattr(forward, "begin", noting)
        return pipes

    return follow


def test_the_pipeline_whose_call_runs_is_the_one_that_counts_not_the_one_attached_to(seen):
    pipe, call = stock_pipeline("FluxPipeline")
    call |= {"output_type": "latent", "num_inference_steps": 2}
    other = diffusers.FluxImg2ImgPipeline(**pipe.components)
    with dit_accel.attach(pipe, preset="none") as attachment:
        pipes = seen(attachment, pipe.transformer)
        pipe(**call)
        assert pipes == [pipe, pipe]
        pipes.clear()
        other(**call, image=picture(), strength=1.0)
        assert pipes
        assert set(map(id, pipes)) == {id(other)}
        assert attachment.engine.layers[0].state.running is None  # outside forwards


def test_a_loop_written_by_hand_has_no_pipeline(seen):
    transformer = tiny_transformer()
    with dit_accel.attach(transformer, preset="none") as attachment, torch.no_grad():
        pipes = seen(attachment, transformer)
        transformer(torch.randn(1, 12, 5, 8, 8), torch.tensor([900.0]), torch.randn(1, 6, 64))
        assert pipes == [None]


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
    found = []

    class Outer(type(pipe)):
        def __call__(self):
            found.append(id(sys._getframe()))
            self.denoise()

        def denoise(self):
            found.append(current_run(self.transformer).frame)

    Outer(**pipe.components)()
    assert found[0] == found[1]
