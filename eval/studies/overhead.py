"""Measures what an attached method that saves nothing costs a step: `python eval/studies/overhead.py`.

A step is a conditional and an unconditional forward. The caches measure what they would decide by, and never skip; PAG
in free mode perturbs a layer of every unconditional forward. Two copies of a model, one plain and one attached, take
each step in turn, and processor time is compared pair by pair, so that other work on the machine does not count.

Whole steps of `wan-plain` differ among themselves by about as much as a cache costs. So caches are measured on
hollow copies too, whose blocks give stored tensors: what is left of the difference is the cache's own. A whole forward
runs before each hollow step, untimed, so that the processor's caches are as cold as they are in a real step. The
difference is held against a whole step of `wan-plain`, and against one of Wan 2.1 1.3B's shape.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from dit_accel_assets import model_path
from dit_accel_eval.runs.results import Line, markdown_table
from product_time import LATENTS as PRODUCT_LATENTS
from product_time import make_transformer
from study import about, seconds_of, study
from torch import Tensor

import dit_accel
from dit_accel.methods.config import MethodConfig

NEVER = 1e-12
"""A threshold below which nothing lies; with 0 nothing would be measured."""

WHOLE: dict[str, MethodConfig | None] = {
    "plain again": None,
    "radial, dense": dit_accel.RadialAttention(dense_steps=1000),
    "pag, free mode": dit_accel.PAG(layers="L1", mode="free"),
}
"""Name of an arm -> what is attached where whole steps are compared; the first shows what is off by itself."""

CACHES: dict[str, MethodConfig] = {
    "easycache": dit_accel.EasyCache(threshold=NEVER, warmup_steps=0, predictor="taylor"),
    "teacache": dit_accel.TeaCache(threshold=NEVER, warmup_steps=0, predictor="taylor"),
    "magcache": dit_accel.MagCache(threshold=NEVER, warmup_steps=0, predictor="taylor"),
    "firstblockcache": dit_accel.FirstBlockCache(threshold=NEVER, warmup_steps=0, predictor="taylor"),
}
"""Name of a cache -> what is attached, to whole and to hollow copies."""

BLOCKS = 30
"""Of Wan 2.1 1.3B."""


class Subject(NamedTuple):
    """A model that is measured.

    Attributes:
        name: what the table calls it.
        make: builds it, with as many blocks as are requested; None: all that it has.
        latents: [B, C, T, H, W].
        text: tokens of a prompt.
    """

    name: str
    make: Callable[[int | None], WanTransformer3DModel]
    latents: tuple[int, ...]
    text: int


def _embedded(blocks: int | None) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(model_path("wan-plain") / "transformer")


def _released(blocks: int | None) -> WanTransformer3DModel:
    return make_transformer(BLOCKS if blocks is None else blocks)


SMALL = Subject("wan-plain, 576 tokens", _embedded, (1, 12, 9, 16, 16), 32)
REAL = Subject("Wan 2.1 1.3B's shape, 4200 tokens", _released, PRODUCT_LATENTS, 512)


def table(records: Sequence[Line]) -> str:
    """Return the lines of a run as a Markdown table under a sentence on how they were measured."""
    first = records[0]
    plain = {line["model"]: line["plain_seconds_a_step"] for line in records[::-1]}
    head = (
        f"{first['pairs']} steps of two forwards on each of two copies in turn, {first['threads']} thread of processor "
        f"time, torch {first['torch']}, {first['processor']}; medians and their 95 % intervals. A plain step takes "
        + ", ".join(f"{seconds:.3g} s ({model})" for model, seconds in plain.items())
        + "."
    )
    rows = []
    for line in records:
        share, (low, high) = line["overhead"], line["overhead_interval"]
        more = 1000 * share * line["plain_seconds_a_step"]
        measured = "alone" if line["alone"] else "in whole steps"
        range_ = f"{share:+.2%} [{low:+.2%}, {high:+.2%}]"
        rows.append((line["arm"], line["model"], measured, range_, f"{more:+.2f}"))
    heads = "attached, all computed | model | measured | more than a plain step | in ms"
    return f"{head}\n\n{markdown_table(heads, rows)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write one JSON line an arm: processor seconds a step, and the median overhead with its 95 % interval."""
    pairs = {"type": int, "default": 300, "help": "steps that both copies take (%(default)s)"}
    steps = {"type": int, "default": 20, "help": "of one generation (%(default)s)"}
    return study(__doc__, arguments, measure, table, out="overhead.jsonl", pairs=pairs, steps=steps)


def measure(options: Any, lines: list[Line]) -> Iterator[Line]:
    """Give a line for each arm and model, in whole steps and alone."""

    def line(arm: str, subject: Subject, alone: bool, plain: np.ndarray, more: np.ndarray) -> Line:
        draws = np.random.default_rng(0).choice(more, (2000, len(more)))
        interval = np.quantile(np.median(draws, 1), (0.025, 0.975))
        return {
            "arm": arm, "model": subject.name, "alone": alone, "plain_seconds_a_step": float(np.median(plain)),
            "overhead": float(np.median(more)), "overhead_interval": interval.tolist(), "pairs": options.pairs,
            "steps": options.steps, **about(),
        }  # fmt: skip

    for arm, method in (*WHOLE.items(), *CACHES.items()):
        seconds = measured(SMALL, method, options.pairs, options.steps)
        yield line(arm, SMALL, False, seconds[:, 2], seconds[:, 1] / seconds[:, 0] - 1)
    for subject in (SMALL, REAL):
        for arm, method in CACHES.items():
            seconds = measured(subject, method, options.pairs, options.steps, alone=True)
            plain = seconds[:, 2] if subject is SMALL else np.array(_whole_step(subject))
            yield line(arm, subject, True, plain, (seconds[:, 1] - seconds[:, 0]) / np.median(plain))


@torch.no_grad()
def measured(
    subject: Subject, method: MethodConfig | None, pairs: int, steps: int, *, alone: bool = False
) -> np.ndarray:
    """Return processor seconds of each step, [pairs, plain, attached and whole]; the first two steps warm up.

    A whole step is a plain one; of hollow copies, one of `wan-plain` in the same moments.

    Args:
        subject: the model.
        method: what is attached to one of its copies.
        pairs: steps that both copies take.
        steps: of one generation.
        alone: on hollow copies.
    """
    torch.manual_seed(0)
    plain, other = (hollow(subject) if alone else subject.make(None) for _ in range(2))
    cold = _cold() if alone else None
    text, seconds = torch.randn(1, subject.text, plain.config["text_dim"]), np.zeros((pairs + 2, 3))
    x = torch.randn(subject.latents)
    with dit_accel.attach(other, method) if method else contextlib.nullcontext():
        for pair in range(pairs + 2):
            step = pair % steps
            x = torch.randn(subject.latents) if step == 0 else 0.98 * x
            for place in (0, 1) if pair % 2 else (1, 0):
                if cold is not None:
                    seconds[pair, 2] += seconds_of(cold)
                seconds[pair, place] = _step((plain, other)[place], x, text, step, steps)
            seconds[pair, 2] = seconds[pair, 2] or seconds[pair, 0]
    return seconds[2:]


def hollow(subject: Subject) -> WanTransformer3DModel:
    """Return a model whose blocks compute nothing: each gives a tensor of its own, the same at every call.

    Blocks past the first hold no weights.
    """
    model = subject.make(1 if subject is REAL else None)
    if subject is REAL:
        with torch.device("meta"):
            model.blocks.extend(subject.make(BLOCKS - 1).blocks)
        model.register_to_config(num_layers=BLOCKS)
    _, _, frames, height, width = subject.latents
    size = 1, frames * height * width // 4, model.config["num_attention_heads"] * model.config["attention_head_dim"]
    for block in model.blocks:
        block.forward = partial(_given, torch.randn(size))
    return model


def _cold() -> Callable[[], object]:
    """Return what runs a whole forward of `wan-plain`."""
    model, text, x = SMALL.make(None), torch.randn(1, SMALL.text, 1), torch.randn(SMALL.latents)
    text = text.expand(-1, -1, model.config["text_dim"])
    return partial(model, x, torch.tensor([500.0]), text, return_dict=False)


def _given(kept: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return kept


def _whole_step(subject: Subject) -> float:
    """Return processor seconds of a step, worked out from steps of one block and of none but stored ones."""
    one, none = subject.make(1), hollow(subject)
    text, x = torch.randn(1, subject.text, one.config["text_dim"]), torch.randn(subject.latents)
    with torch.no_grad():
        seconds = np.array([[_step(model, x, text, 0, 1) for model in (one, none)] for _ in range(4)])[1:]
    block, rest = np.median(seconds[:, 0] - seconds[:, 1]), np.median(seconds[:, 1])
    return float(rest + BLOCKS * block)


def _step(transformer: WanTransformer3DModel, x: Tensor, text: Tensor, step: int, steps: int) -> float:
    """Return the processor seconds of a step of two forwards."""
    time_of = torch.tensor([1000.0 * (1 - step / steps)])

    def run() -> None:
        for branch in ("cond", "uncond"):
            with transformer.cache_context(branch, step_index=step, num_inference_steps=steps):
                transformer(x, time_of, text, return_dict=False)

    return seconds_of(run)


if __name__ == "__main__":
    raise SystemExit(main())
