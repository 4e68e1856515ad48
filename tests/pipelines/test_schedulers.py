"""Schedulers: steps, noise level and windows are those of the loop; solvers take the schedule of the model."""

import functools
import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from dit_accel_pipelines.generation import solvers
from matrix_runs import changed_step
from some_cases import some
from tiny_stock import stock_pipeline

import dit_accel
from dit_accel import SLG, ConfigError, EasyCache, LiteAttention, SeaCache, SparseD, StaticCache

STEPS = 6


def scheduler_names() -> list[str]:
    """Names of all scheduler classes of diffusers."""
    names = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    return [one for one in names if inspect.isclass(cls := getattr(diffusers, one)) and issubclass(cls, SchedulerMixin)]


def made(name: str, flow: bool) -> Any:
    """A scheduler for a model of flow matching or of betas, as far as its class has a choice; raises where it can't."""
    cls = getattr(diffusers, name)
    known = inspect.signature(cls.__init__).parameters
    options: dict[str, Any] = {"skip_prk_steps": True} if "skip_prk_steps" in known else {}
    if flow and "use_flow_sigmas" in known:
        options |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    return cls(**options)


@dataclass
class Walk:
    """A pipeline's loop: which of its rounds each forward of the transformer ran in.

    Attributes:
        rounds: how many the loop made.
        forwards: of each forward that ran, (round, timestep in the scheduler's list, what was seen).
    """

    rounds: int = 0
    forwards: list[tuple[int, float, Any]] = field(default_factory=list)
    latents: Any = None

    @property
    def ran(self) -> list[int]:
        """Forwards that ran, by round."""
        return np.bincount([one for one, *_ in self.forwards], minlength=self.rounds).tolist()


def walked(pipe: Any, call: dict[str, Any], see: Any = lambda: None, walk: Walk | None = None) -> Walk:
    """Run a pipeline and note its rounds and forwards."""
    walk, scheduler = walk or Walk(), pipe.scheduler

    def note(*_: Any) -> None:
        walk.forwards.append((walk.rounds, float(scheduler.timesteps[walk.rounds]), see()))

    def counted(_: int, step: Any, latents: Any) -> Any:
        walk.rounds += 1
        return step(latents)

    hook = pipe.transformer.register_forward_pre_hook(note)
    try:
        with changed_step(pipe, counted), torch.no_grad():
            out = pipe(**call, generator=torch.Generator().manual_seed(0))
    finally:
        hook.remove()
    walk.latents = getattr(out, "frames", None) if hasattr(out, "frames") else out.images
    return walk


def steps_of(rounds: int, steps: int = STEPS) -> list[int]:
    """Which step each round of a run is, by how many rounds there are beside the steps that were requested."""
    if rounds <= steps:  # MiniMax-H3's lists one noise level fewer
        return list(range(rounds))
    if rounds == steps + 1:  # PNDM evaluates its second timestep twice
        return [max(0, one - (one > 1)) for one in range(rounds)]
    assert rounds == 2 * steps - 1, (rounds, steps)  # Heun, DPM2: but for the first step twice
    return [(one + 1) // 2 for one in range(rounds)]


def noise_at(scheduler: Any, timestep: float) -> float | None:
    """The noise level that a timestep of a scheduler's list stands for, by what the class trains on; None: not told."""
    config = scheduler.config
    if not hasattr(scheduler, "sigmas"):
        return None
    if type(scheduler).__name__ == "MiniMaxH3Scheduler":
        return 1 - timestep
    if "sigma_data" in config:
        return math.exp(4 * timestep) if "EDM" in type(scheduler).__name__ else math.exp(timestep / 250)
    if "shift" in config or config.get("use_flow_sigmas"):
        return 1 - timestep / 1000 if config.get("invert_sigmas") else timestep / 1000
    if "beta_schedule" in config:
        signal = scheduler.alphas_cumprod.double().numpy()
        levels = np.log(np.sqrt((1 - signal) / signal))
        return float(np.exp(np.interp(timestep, np.arange(len(levels)), levels)))
    return math.nan


PIPELINES = {
    "wan": "WanPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "mochi": "MochiPipeline",
    "cogvideox": "CogVideoXPipeline",
    "pixart": "PixArtSigmaPipeline",
    "hunyuan-dit": "HunyuanDiTPipeline",
}
FLOWS = ("wan", "sd3", "mochi")
CACHED = dict(warmup_steps=2, last_steps=1)
TILES = dict(block_size=16)
CACHES = {
    "staticcache": (StaticCache(every=2, **CACHED), lambda step: step % 2),
    "easycache": (EasyCache(threshold=1e9, **CACHED), lambda step: False),
    "seacache": (SeaCache(threshold=1e9, max_consecutive=STEPS, **CACHED), lambda step: False),
}
"""A cache, and which steps it computes besides the first two and the last."""
SPARSE = {
    "sparsed": (SparseD(density=0.5, dense_steps=0.5, dense_last_steps=0, dense_layers=0, **TILES), 0.5),
    "liteattention": (LiteAttention(target_density=0.5, dense_steps=2, **TILES), 0.3),
}
"""A sparse method, and the share of the run from which on it plans."""
WINDOW = SLG(layers="L1", scale=2.0, start=0.4, stop=0.8)
FEW = {
    "wan": "UniPCMultistepScheduler", "sd3": "FlowMatchHeunDiscreteScheduler", "cogvideox": "DDIMScheduler",
    "mochi": "FlowMatchEulerDiscreteScheduler", "pixart": "KDPM2AncestralDiscreteScheduler",
    "hunyuan-dit": "PNDMScheduler",
}  # fmt: skip
LEAST = {"wan": 15, "sd3": 20, "mochi": 4, "cogvideox": 20, "pixart": 20, "hunyuan-dit": 20}
"""Schedulers that a pipeline is known to run with, at least; a newer diffusers may have more."""


@functools.cache
def plain_of(name: str) -> tuple[Any, dict[str, Any]]:
    pipe, call = stock_pipeline(PIPELINES[name])
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**call, "num_inference_steps": STEPS, "output_type": "latent"}


def runs_with(name: str, scheduler: str) -> bool:
    """Give a pipeline a scheduler, and tell whether diffusers runs it so."""
    pipe, call = plain_of(name)
    try:
        pipe.scheduler = made(scheduler, name in FLOWS)
        latents = walked(pipe, call).latents
    except Exception:
        return False
    return bool(torch.as_tensor(latents).isfinite().all())


def wrong_with(name: str, scheduler: str) -> tuple[list[str], int, int]:
    """Return what is wrong in a pipeline with a scheduler, how many methods ran and how many were refused."""
    pipe, call = plain_of(name)
    plain = walked(pipe, call)
    states = name == "wan"  # it states its rounds as steps
    steps = list(range(plain.rounds)) if states else steps_of(plain.rounds)
    count, wrong, ran, refused = steps[-1] + 1, [], 0, 0

    def expect(what: str, found: Any, expected: Any) -> None:
        if found != expected:
            wrong.append(f"{name}, {scheduler}, {what}: {found}, expected {expected}")

    with dit_accel.attach(pipe, preset="none") as attachment:
        state = attachment.denoising
        seen = walked(pipe, call, lambda: (state.step_index, state.num_inference_steps, state.sigma))
    for index, timestep, (step, known, sigma) in seen.forwards:
        expect(f"round {index}", (step, known), (steps[index], count))
        level = noise_at(pipe.scheduler, timestep) if not states else float(pipe.scheduler.sigmas[index])
        told = sigma is not None and level is not None
        if not told or not (math.isnan(level) or math.isclose(sigma, level, rel_tol=0.02, abs_tol=2e-3)):
            expect(f"noise of round {index}", sigma, level)
    if states and count != STEPS:
        return wrong, 1, 0  # its own count, from which the windows below follow as anywhere
    for method, (config, besides) in CACHES.items():
        computes = [bool(step in (0, 1, count - 1) or besides(step)) for step in steps]
        try:
            attachment = dit_accel.attach(pipe, config)
        except ConfigError as error:
            refused += 1
            expect(method, f"refused: {error}" if method != "seacache" else hasattr(pipe.scheduler, "sigmas"), False)
            continue
        with attachment:
            expect(method, [bool(one) for one in walked(pipe, call).ran], computes)
        ran += 1
    for method, (config, since) in SPARSE.items():
        rounds, walk = set(), Walk()
        note = functools.partial(lambda rounds, walk, _: rounds.add(walk.rounds), rounds, walk)
        with dit_accel.attach(pipe, config, backend="torch") as attachment, attachment.observe(note):
            walked(pipe, call, walk=walk)
        expect(method, [one in rounds for one in range(plain.rounds)], [step >= since * count for step in steps])
        ran += 1
    with dit_accel.attach(pipe, WINDOW):
        more = [with_it - without for with_it, without in zip(walked(pipe, call).ran, plain.ran, strict=True)]
    expect("slg", [bool(one) for one in more], [0.4 <= step / count < 0.8 for step in steps])
    return wrong, ran + 1, refused


@pytest.mark.parametrize("name", some(FEW, "wan", "pixart"))
def test_a_scheduler_of_each_kind(name):
    assert runs_with(name, FEW[name])
    wrong, ran, _ = wrong_with(name, FEW[name])
    assert not wrong
    assert ran >= 5


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_every_scheduler(name, record_property):
    found = {one: wrong_with(name, one) for one in scheduler_names() if runs_with(name, one)}
    for number, what in enumerate(("ran", "refused"), 1):
        record_property(what, sum(one[number] for one in found.values()))
    assert not [text for wrong, *_ in found.values() for text in wrong]
    assert len(found) >= LEAST[name]


SHIPPED = {
    "unipc": diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
    "euler": diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
}


def solved(scheduler, steps: int) -> float:
    """Where the flow v = x - 1 takes x = 2 on the way from noise level 1 to 0."""
    scheduler.set_timesteps(steps)
    x = torch.full((1, 1, 2, 2), 2.0)
    for timestep in scheduler.timesteps:
        x = scheduler.step(x - 1.0, timestep, x).prev_sample
    return float(x.mean())


@pytest.mark.parametrize("solver", solvers.SOLVERS)
@pytest.mark.parametrize("shipped", SHIPPED)
def test_solvers_converge_to_one_solution_on_the_models_own_schedule(solver, shipped):
    scheduler = solvers.make_scheduler(SHIPPED[shipped], solver)
    assert solvers.shift_of(scheduler) == 5.0
    exact = 1 + torch.e**-1
    near, far = (
        abs(solved(scheduler, 200) - exact),
        abs(solved(solvers.make_scheduler(SHIPPED[shipped], solver), 10) - exact),
    )
    assert near < 3e-3
    assert near < far
    assert solvers.shift_of(solvers.make_scheduler(SHIPPED[shipped], solver, 3.0)) == 3.0


BETAS = {
    "cogvideox": diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0, timestep_spacing="trailing"
    ),
    "pixart": diffusers.DPMSolverMultistepScheduler(
        timestep_spacing="trailing"
    ),  # whose config has a flow_shift it does not use
}
SPREAD = 0.5


def denoised(shipped, scheduler, steps: int) -> tuple[float, float]:
    """Where x = 1 goes from the first noise level, for data of spread `SPREAD` around 0, and where it should."""
    scheduler.set_timesteps(steps)
    first = float(shipped.alphas_cumprod[int(scheduler.timesteps[0])].clamp(min=2**-24))
    x = torch.full((1, 1, 2, 2), 1.0, dtype=torch.float64) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, timestep)
        signal = shipped.alphas_cumprod[round(float(timestep))].double().clamp(min=2**-24)
        clean = signal.sqrt() * SPREAD**2 / (signal * SPREAD**2 + 1 - signal) * seen
        noise = (seen - signal.sqrt() * clean) / (1 - signal).sqrt()
        velocity = signal.sqrt() * noise - (1 - signal).sqrt() * clean
        told = velocity if shipped.config.prediction_type == "v_prediction" else noise
        x = scheduler.step(told, timestep, x).prev_sample
    return float(x.mean()), SPREAD / (first * SPREAD**2 + 1 - first) ** 0.5


@pytest.mark.parametrize("solver", solvers.SOLVERS)
@pytest.mark.parametrize("shipped", BETAS)
def test_solvers_converge_on_a_schedule_of_betas(solver, shipped):
    one = BETAS[shipped]
    assert (solvers.is_flow(one.config), solvers.is_of_betas(one.config), solvers.shift_of(one)) == (False, True, None)
    scheduler = solvers.make_scheduler(one, solver)
    kept = one.alphas_cumprod.double().clamp(min=2**-24)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), kept, rtol=2e-3, atol=1e-7)
    (far, exact), (near, _) = (denoised(one, solvers.make_scheduler(one, solver), steps) for steps in (10, 200))
    assert abs(near - exact) < 0.025  # the first step, out of pure noise, is of first order with every solver
    assert abs(near - exact) < abs(far - exact) / 8
    with pytest.raises(ConfigError, match=r"noise shift, got flow_shift 2.0"):
        solvers.make_scheduler(one, solver, 2.0)


def test_what_knows_neither_schedule_is_refused():
    with pytest.raises(ConfigError, match=r"solver 'eulr'.*'euler'"):
        solvers.make_scheduler(SHIPPED["euler"], "eulr")
    with pytest.raises(ConfigError, match=r"FlowMatchEulerDiscreteScheduler.*betas"):
        solvers.scheduler_like(BETAS["cogvideox"], "FlowMatchEulerDiscreteScheduler")
    with pytest.raises(ConfigError, match=r"DDIMScheduler.*flow"):
        solvers.scheduler_like(SHIPPED["euler"], "DDIMScheduler")
    with pytest.raises(ConfigError, match=r"EDMEulerScheduler.*noise shift.*UniPCMultistep"):
        solvers.make_scheduler(diffusers.EDMEulerScheduler(), "unipc")


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_a_shift_that_grows_with_the_tokens_keeps_its_bounds_or_is_one_for_all(solver):
    shipped = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.7, max_shift=1.3
    )
    scheduler = solvers.make_scheduler(shipped, solver)
    assert (scheduler.config["base_shift"], scheduler.config["max_shift"]) == (0.7, 1.3)
    assert scheduler.config["use_dynamic_shifting"]
    scheduler.set_timesteps(4, mu=0.9)
    scheduler = solvers.make_scheduler(shipped, solver, 2.0)
    if solver != "euler":  # which leaves any mu aside
        assert scheduler.config["base_shift"] == scheduler.config["max_shift"] == math.log(2)
    scheduler.set_timesteps(3, mu=math.log(2))  # as pipelines do along the line between the bounds
    usual = solvers.make_scheduler(SHIPPED["euler"], solver, 2.0)
    usual.set_timesteps(3)
    assert float(scheduler.sigmas[1]) == pytest.approx(float(usual.sigmas[1]), abs=0.01)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_shift_goes_with_the_models_own_scheduler(dynamic):
    """Whatever mu the pipeline works out, as FLUX.2 does by a formula of its own."""
    shipped, sigmas = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dynamic), [1.0, 0.5, 0.25]
    own = solvers.make_scheduler(shipped, None, 3.0)
    own.set_timesteps(sigmas=sigmas, mu=0.7)
    assert (type(own), shipped.config.shift) == (type(shipped), 1.0)
    np.testing.assert_allclose(own.sigmas[:-1], [3 * sigma / (1 + 2 * sigma) for sigma in sigmas], rtol=1e-6)
    assert solvers.shift_of(solvers.make_scheduler(SHIPPED["unipc"], None, 3.0)) == 3.0
    growing = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, use_dynamic_shifting=dynamic)
    bounds = solvers.make_scheduler(growing, None, 3.0).config
    assert [bounds.get("base_shift"), bounds.get("max_shift")] == [math.log(3)] * 2 if dynamic else [None] * 2
    with pytest.raises(ConfigError, match=r"noise shift, got flow_shift 3.0"):
        solvers.make_scheduler(BETAS["cogvideox"], None, 3.0)
