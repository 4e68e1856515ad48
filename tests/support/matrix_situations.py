"""The situations of the matrix: what is run of a pipeline with a method attached, and what each must equal."""

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import matrix_runs as runs
import torch
from matrix_methods import GUIDING, METHODS, STEPS
from matrix_runs import rows_call
from tiny_stock import PIPELINES, Call
from torch import Tensor

import dit_accel
from dit_accel.adapters.installed import adapter_for

NO_PROPORTION = (
    "CosmosVideoToWorldPipeline", "HunyuanDiTPipeline", "HunyuanDiTControlNetPipeline", "AllegroPipeline",
    "Kandinsky5I2VPipeline",
)  # fmt: skip
"""Pipeline classes in which what guidance adds is not in proportion: Kandinsky's scales the first frame of the result
to the next ones', the schedulers of the three before it clip the clean prediction; of the first it is not known why NAG
alone is not."""
SPREAD = 100.0
"""So many times the rounding by which a plain batch differs from its rows alone is still rounding with a method."""
NOT_BARE = ("attach to the pipeline", "must know which prompt")
"""What is advised where a method is refused on a transformer alone."""
ROUNDING, EXACT = 1e-5, 1e-9
"""The least difference that counts in float32 and in float64, as a share of the largest latent."""
DOUBT = 10.0
"""Up to so many times `ROUNDING` a difference may still be a processor's."""


def class_names(pipe: Any) -> set[str]:
    """Return the names of a pipeline's class and of all that it inherits from: some of the tiny ones are subclasses."""
    return {cls.__name__ for cls in type(pipe).__mro__}


@dataclass
class Plain:
    """A pipeline without methods, its runs kept: the tolerance comes from them.

    Attributes:
        name: the class's name.
        wide: whether it runs in float64.
    """

    name: str
    wide: bool = False
    kept: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stock, self.rounding = PIPELINES[self.name], EXACT if self.wide else ROUNDING
        self.pipe, self.call = runs.prepared(self.name)
        if self.wide:
            self.call = runs.widened(self.pipe, self.call)

    def rows(self, prompts: Sequence[int], seeds: Sequence[int], how: str = "") -> Tensor:
        """Return the latents of a plain run; it must be made before anything is attached."""
        key = (tuple(prompts), tuple(seeds), how)
        if key not in self.kept:
            if dit_accel.attachment_of(transformer_of(self.pipe)) is not None:
                raise RuntimeError(f"the plain run {key} was not prepared")
            self.kept[key] = run_rows(self, prompts, seeds, how)
        return self.kept[key]


def transformer_of(pipe: Any) -> Any:
    """The transformer of a pipeline, or the first of several."""
    return getattr(pipe, "pipe", pipe).transformer


@contextmanager
def called(plain: Plain, prompts: Sequence[int], how: str) -> Iterator[Call]:
    """Yield the call of some prompts in a way of guiding."""
    pipe, stock, call = plain.pipe, plain.stock, plain.call
    if how and how != "images":
        call = runs.with_negative(pipe, call)
    negatives = list(prompts) if how == "negative" else None
    made = rows_call(stock, call, prompts, negatives)
    with ExitStack() as stack:
        if how == "off":
            made = stack.enter_context(runs.scaled(stock, pipe, made, None))
        elif how == "end":
            made = stack.enter_context(runs.ending(stock, pipe, made, len(prompts)))
        elif how.startswith("scale"):
            made = stack.enter_context(runs.scaled(stock, pipe, made, float(how.split()[1])))
            if "num_inference_steps" not in made:
                raise ValueError("it takes no single step")
            made = {**made, "num_inference_steps": 1}
        elif how == "images":
            names = [one for one in ("num_images_per_prompt", "num_videos_per_prompt") if one in runs.parameters(pipe)]
            if not names:
                raise ValueError("it makes one of each prompt")
            made = {**made, names[0]: 2}
        yield made


def run_rows(plain: Plain, prompts: Sequence[int], seeds: Sequence[int], how: str = "") -> Tensor:
    """Return the latents of a run of some prompts from the noise of some seeds."""
    with called(plain, prompts, how) as call:
        made = runs.run(plain.pipe, call, seeds)
    if plain.stock.one:
        made = made[None]
    if len(made) != len(seeds):
        raise ValueError(f"{len(seeds)} rows were asked for, and {len(made)} came")
    return made


@dataclass
class Trial:
    """A method attached to a pipeline; runs from the same prompt and noise are made once.

    Attributes:
        plain: the pipeline.
        method: the method's name.
    """

    plain: Plain
    method: str
    kept: dict[Any, Tensor] = field(default_factory=dict)
    attachment: Any = None

    def __post_init__(self) -> None:
        self.configs, self.pipe = METHODS[self.method](self.plain.call), self.plain.pipe
        self.transformer = transformer_of(self.pipe)

    def attach(self, model: Any = None) -> Any:
        """Attach the method to the pipeline, or to another model."""
        return dit_accel.attach(model or self.pipe, *self.configs, preset="none", backend="torch")

    def fresh(self) -> "Trial":
        """Begin anew: detach, attach and forget all runs."""
        self.close()
        self.kept.clear()
        self.attachment = self.attach()
        return self

    def close(self) -> None:
        """Detach."""
        if self.attachment is not None:
            self.attachment.detach()
        self.attachment = None

    def rows(self, prompts: Sequence[int], seeds: Sequence[int], how: str = "") -> Tensor:
        """Return the latents of a run, made at the first time that it is asked for."""
        key = (tuple(prompts), tuple(seeds), how)
        if key not in self.kept:
            self.kept[key] = run_rows(self.plain, prompts, seeds, how)
        return self.kept[key]

    def one(self) -> Tensor:
        """The run of the first prompt alone."""
        return self.rows([0], [0])


def far(one: Tensor, other: Tensor) -> float:
    """The largest difference of two runs; infinite where one is not finite or of another shape."""
    if one.shape != other.shape or not bool(one.isfinite().all()) or not bool(other.isfinite().all()):
        return float("inf")
    return float((one - other).abs().max())


def wrong(what: str, difference: float, allowed: float = 0.0) -> list[str]:
    """Say in a line how far two runs differ, where that is too far."""
    return [] if difference <= allowed else [f"{what}: {difference:.2g} off, {allowed:.2g} is rounding"]


ROWS: dict[str, tuple[str, list[int], list[int]]] = {
    "two prompts, equal seeds": ("", [0, 1], [0, 0]),
    "two prompts, other seeds": ("", [0, 1], [0, 1]),
    "two of one prompt": ("images", [0, 0], [0, 1]),
    "guidance off": ("off", [0, 1], [0, 0]),
    "negative prompts": ("negative", [0, 1], [0, 0]),
    "guidance ends midway": ("end", [0, 1], [0, 0]),
}
"""Situations of two rows -> the way of guiding, the prompts and the seeds."""


def compare_rows(trial: Trial, how: str, prompts: Sequence[int], seeds: Sequence[int]) -> list[str]:
    """Compare each row of a batch with that row alone; what a processor's rounding may be is judged in float64."""
    asked, alone = ([prompts[0]], "") if how == "images" else (prompts, how)
    plain = trial.plain.rows(asked, seeds, how=how)
    made, lines, doubtful = trial.rows(asked, seeds, how), [], not trial.plain.wide
    for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        rounding = far(plain[row : row + 1], trial.plain.rows([prompt], [seed], how=alone))
        own = trial.rows([prompt], [seed], alone)
        off, least = far(made[row : row + 1], own), trial.plain.rounding * float(own.abs().max())
        lines += wrong(f"row {row}", off, SPREAD * rounding + least)
        doubtful &= off <= SPREAD * rounding + DOUBT * least
    if not (lines and doubtful):
        return lines
    wide = Plain(trial.plain.name, wide=True)
    try:
        kinds = {wide.rows(asked, seeds, how=how).dtype}
        kinds |= {wide.rows([one], [seed], how=alone).dtype for one, seed in zip(prompts, seeds, strict=True)}
    except RuntimeError:  # of two types in one product: it does not run in float64
        return lines
    if kinds != {torch.float64}:
        return lines
    exact = Trial(wide, trial.method).fresh()
    try:
        return compare_rows(exact, how, prompts, seeds)
    finally:
        exact.close()


def _rows(trial: Trial, situation: str) -> list[str]:
    how, prompts, seeds = ROWS[situation]
    lines = compare_rows(trial, how, prompts, seeds)
    if how == "images":
        return lines + compare_rows(trial, how, prompts, [0, 0])
    if how == "end":
        lines += wrong("second run", far(run_rows(trial.plain, [0], [0], how), trial.rows([0], [0], how)))
    return lines


def _one(trial: Trial) -> list[str]:
    made, plain = trial.one(), trial.plain.rows([0], [0])
    if not bool(made.isfinite().all()):
        return ["not finite"]
    section = trial.attachment.report().section("cfgcache")  # which can do nothing where nothing is guided
    idle = section is not None and not any(entry["branch"] == "uncond" for entry in section.data["forwards"])
    return ["changes nothing"] if torch.equal(made, plain) and not idle else []


def _again(trial: Trial) -> list[str]:
    first = trial.one()
    return wrong("second run", far(run_rows(trial.plain, [0], [0]), first))


def _scale(trial: Trial) -> list[str]:
    """What is added to the prediction does not depend on how far the pipeline guides; what NAG adds grows with that."""
    if trial.method not in GUIDING or (trial.method == "nag" and rescaled(trial)):
        return []
    if class_names(trial.pipe) & set(NO_PROPORTION):
        return []
    added = [trial.rows([0], [0], how) - trial.plain.rows([0], [0], how=how) for how in ("scale 2", "scale 4")]
    if trial.method == "nag":
        added[1] = added[1] / (2.0 if trial.plain.stock.off else 5 / 3)
    size = max(float(one.abs().max()) for one in added)
    latents = float(trial.plain.rows([0], [0], how="scale 4").abs().max())
    return wrong("what is added at scales 2 and 4", far(*added), 2e-3 * size + trial.plain.rounding * latents)


def rescaled(trial: Trial) -> str | None:
    """Why the pipeline rescales the guided prediction, by which what NAG adds is no longer in proportion; or None."""
    patterns = adapter_for(type(trial.transformer).__name__).guidance.rescales
    names = class_names(trial.pipe)
    return next((patterns[one] for one in patterns for name in names if fnmatch.fnmatch(name, one)), None)


def _exception(trial: Trial) -> list[str]:
    first, found = trial.one(), []
    for at in (0, STEPS // 2):
        runs.run_until(trial.pipe, trial.plain.call, at)
        found += wrong(f"after an exception in step {at}", far(run_rows(trial.plain, [0], [0]), first))
    return found


def _interrupt(trial: Trial) -> list[str]:
    first = trial.one()
    runs.run_interrupted(trial.pipe, trial.plain.call, 1)
    return wrong("after an interrupt", far(run_rows(trial.plain, [0], [0]), first))


def _bare(trial: Trial) -> list[str]:
    """The method is attached to the transformer alone, and a run raises in its first step."""
    trial.close()
    try:
        trial.attachment = trial.attach(trial.transformer)
        try:
            first = run_rows(trial.plain, [0], [0])
        except dit_accel.ConfigError as error:
            if not any(advice in str(error) for advice in NOT_BARE):
                raise
            return []
        trial.close()
        trial.attachment = trial.attach(trial.transformer)
        runs.run_until(trial.pipe, trial.plain.call, 0)
        return wrong("after an exception in step 0", far(run_rows(trial.plain, [0], [0]), first))
    finally:
        trial.fresh()


def longer(call: Call) -> Call:
    """Return a call of more steps."""
    more = {"num_inference_steps": STEPS + 2} if "num_inference_steps" in call else {}
    if call.get("guidance_schedule") is not None:
        more["guidance_schedule"] = (*call["guidance_schedule"], *call["guidance_schedule"][-2:])
    return {**call, **more}


def _other(trial: Trial) -> list[str]:
    """Another pipeline around the transformer, of another number of steps, is as under an attachment of its own."""
    first, other, call = trial.one(), runs.twin(trial.pipe), longer(trial.plain.call)
    trial.close()
    try:
        with trial.attach(other):
            own = runs.run(other, call)
        trial.fresh()
        before = runs.run(other, call)
        found = wrong("another pipeline, before", far(before, own))
        found += wrong("the pipeline behind another", far(run_rows(trial.plain, [0], [0]), first))
        found += wrong("another pipeline, behind", far(runs.run(other, call), own))
        shared = runs.copy.copy(trial.pipe)
        found += wrong("a copy that shares the scheduler", far(runs.run(shared, call), own))
        return found
    finally:
        trial.fresh()


def _in_place(trial: Trial) -> list[str]:
    first = trial.one()
    return wrong("latents written in place", far(runs.run_in_place(trial.pipe, trial.plain.call), first))


def _detached(trial: Trial) -> list[str]:
    trial.one()
    trial.close()
    try:
        return wrong("detached", far(run_rows(trial.plain, [0], [0]), trial.plain.rows([0], [0])))
    finally:
        trial.fresh()


SITUATIONS: dict[str, Callable[[Trial], list[str]]] = {
    "one prompt": _one,
    "second run": _again,
    **{name: partial(_rows, situation=name) for name in ROWS},
    "another guidance scale": _scale,
    "after an exception": _exception,
    "after an interrupt": _interrupt,
    "bare transformer, after an exception": _bare,
    "another pipeline": _other,
    "latents in place": _in_place,
    "detached": _detached,
}
"""Situation -> what is wrong in it, in words; nothing: all is right."""


def prepare(situation: str, plain: Plain) -> None:
    """Make the plain runs that a situation is compared with, before anything is attached; raise what diffusers does."""
    if situation in ROWS:
        how, prompts, seeds = ROWS[situation]
        alone = "" if how == "images" else how
        own = [plain.rows([prompt], [seed], how=alone) for prompt, seed in zip(prompts, seeds, strict=True)]
        _rows_alike(plain.rows(prompts[:1] if how == "images" else prompts, seeds, how=how), own)
        if how == "images":
            plain.rows([0], [0, 0], how=how)
    elif situation == "another guidance scale":
        one, other = (plain.rows([0], [0], how=how) for how in ("scale 2", "scale 4"))
        if torch.equal(one, other):
            raise ValueError("it changes nothing in this class")
    else:
        plain.rows([0], [0])


def plain_of(situation: str, plain: Plain) -> None:
    """Bring the plain pipeline into a situation; it raises what diffusers does."""
    prepare(situation, plain)
    if situation in ("guidance off", "guidance ends midway"):
        if torch.equal(plain.rows([0], [0], how=ROWS[situation][0]), plain.rows([0], [0], how="guided")):
            raise ValueError("it changes nothing in this class")
    elif situation.endswith("after an exception"):
        runs.run_until(plain.pipe, plain.call, 0)
    elif situation == "after an interrupt":
        runs.run_interrupted(plain.pipe, plain.call, 1)
    elif situation == "another pipeline":
        runs.run(runs.twin(plain.pipe), longer(plain.call))
    elif situation == "latents in place" and far(runs.run_in_place(plain.pipe, plain.call), plain.rows([0], [0])):
        raise ValueError("the plain pipeline gives something else")


def _rows_alike(batch: Tensor, alone: Sequence[Tensor]) -> None:
    """Raise unless a plain batch is its rows alone but for rounding."""
    for row, own in enumerate(alone):
        off = far(batch[row : row + 1], own)
        if off > 1e-3 * float(own.abs().max()):
            raise ValueError(f"row {row} of the plain batch is {off:.2g} off")
