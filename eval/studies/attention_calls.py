"""Times single attention calls of released models' sizes on a CPU: `python eval/studies/attention_calls.py`.

Each call is computed dense, by the sparse part of each preset, and by FlexAttention over the same tiles. Nothing is
downloaded and no layer is made. Heads do not depend on each other, so a few stand for all. Queries, keys and values are
standard normal, since no trained model of these sizes is here. Sol decides by the data which tiles stay exact: those
whose pooled score exceeds its row's mean by beta deviations. Of normal data these are the share that beta stands for,
1 - Phi(beta), and the tiles that are always exact; a trained model's calls keep another share. So the density is in
effect set by the config here, and a time holds for the density that stands beside it.

Of a few heads' time and of the rate that the model's feed-forward reaches follows what a whole block would take.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from attention_table import DENSE, SPARSE, page_text
from dit_accel_eval.bench.loop import call_seconds, in_turn, machine, quartiles, why_not
from dit_accel_eval.bench.shapes import Shape, named_shapes
from dit_accel_eval.runs.results import Line
from dit_accel_kernels import EXACT, TileLists, block_sparse_attention_eager, predicted_speedup, unpack_bits
from study import study
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from dit_accel.adapters import installed
from dit_accel.adapters.adapter import Adapter, Family
from dit_accel.adapters.joined_text import JoinedText
from dit_accel.estimate.prediction import Prediction, estimate
from dit_accel.estimate.work import attention_flops, other_flops
from dit_accel.methods.attention.sparse import SparseConfig, SparseHandler
from dit_accel.methods.base import AttentionHandler, Model
from dit_accel.methods.compose import make_handlers
from dit_accel.methods.presets import LEVELS, PRESETS, Choice, preset_methods
from dit_accel.plan.call import Call
from dit_accel.plan.context import CallContext
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.plan import AttentionPlan

PROBE_TOKENS = 4096
"""Tokens of the dense call by which times are planned, and of the one that warms each size up."""

SLICE = 1024
"""Tokens over which the feed-forward is timed: what it takes grows with them in proportion."""

OVER_DENSE = {"auto": 1.5, "flex": 2.5}
"""Backend -> seconds of a pair of tokens over dense attention's, by which a call's time is planned; assumed."""

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to compute a call.

    Attributes:
        name: what the table says.
        config: what presets attach; None: dense attention.
        backend: the kernel backend; None: SDPA.
        presets: level -> `SPARSE`, or why a preset computes such a call densely.
    """

    name: str
    config: SparseConfig | None = None
    backend: str | None = None
    presets: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def acting(self) -> SparseConfig | None:
        """The method, acting in every step and layer at any size."""
        always: Any = dict(dense_steps=0, dense_last_steps=0, dense_layers=0, dense_above_sigma=None, min_tokens=None)
        return None if self.config is None else replace(self.config, **always)


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The self-attention of a shape, of some heads and in one dtype.

    Attributes:
        rate: FLOP/s of dense attention, by which times are planned.
    """

    shape: Shape
    heads: int
    dtype: torch.dtype
    rate: float = 1.0

    @cached_property
    def of(self) -> tuple[Adapter, Family]:
        """The adapter of the model, and its sizes."""
        return installed.described(self.shape.family)

    @cached_property
    def planned(self) -> Prediction:
        """What `dit-accel plan` says of a dense run, with the number of frames that the pipeline makes."""
        return self.with_methods()

    def with_methods(self, *methods: SparseConfig) -> Prediction:
        """Return what `dit-accel plan` says of a run with methods."""
        sizes: dict[str, Any] = self.shape.sizes
        return estimate(*self.of, **sizes, methods=methods)

    @cached_property
    def layout(self) -> TokenLayout:
        """The sequence, text on the side where the model has it."""
        layout, text = self.planned.layout, self.of[0].joined_text
        if isinstance(text, JoinedText) and text.place == "before":
            return replace(layout, text_before=layout.text_after, text_after=0)
        return layout

    def model(self, heads: int | None = None) -> Model:
        """Return what methods may know of the model, with all heads or so many."""
        adapter, family = self.of
        return Model(adapter=adapter, family=family, heads=heads or family.heads, layers=family.layers)

    @cached_property
    def arms(self) -> list[Arm]:
        """Dense, the sparse part of each preset, whether its rule takes it here or not, and FlexAttention."""
        lacking: dict[str, str] = {}
        sparse: list[Arm] = []
        for level in LEVELS:
            choice = next((one for one in PRESETS[level] if isinstance(one.config, SparseConfig)), None)
            if choice is None:
                lacking[level] = "no sparse part"
                continue
            config: Any = choice.config
            rule = self._rule(choice, choice in preset_methods(level, self.model()).chosen)
            sparse.append(Arm(name=spelled(config), config=config, backend="auto", presets={level: rule}))
        flex = [replace(one, name=f"{one.name}, flex", backend="flex", presets={}) for one in sparse[:1]]
        return [Arm(name=DENSE, presets=lacking), *sparse, *flex]

    def _rule(self, choice: Choice, attached: bool) -> str:
        """Return `SPARSE`, or why a preset computes such calls densely."""
        if not attached:
            alone = f"{choice.models} models alone" if choice.models != "all" else "not on this model"
            return f"dense by rule: {alone}"
        (handler,) = make_handlers([choice.config], self.model())
        assert isinstance(handler, SparseHandler)
        if handler.applies(self.layout):
            return SPARSE
        return f"dense by rule: below {handler.settings.min_tokens:,} visual tokens"

    def expected(self, arm: Arm) -> float:
        """Return the seconds that a round of an arm should take, with the call that warms a sparse one up."""
        family = self.of[1]
        dense = attention_flops(family, self.layout.tokens) * self.heads / family.heads / self.rate
        if arm.acting is None:
            return dense
        return 2 * dense * self.with_methods(arm.acting).pair_density * OVER_DENSE[arm.backend or "auto"]

    def about(self, arm: Arm) -> Line:
        """Return what is known of a line before it is measured."""
        layout, (_, family) = self.layout, self.of
        return {
            "shape": self.shape.name, "family": family.name, **self.shape.sizes,
            "num_frames": self.planned.num_frames, "tokens": layout.tokens, "visual_tokens": layout.visual_tokens,
            "heads": self.heads, "all_heads": family.heads, "head_dim": family.head_dim, "arm": arm.name,
            "methods": {arm.config.name: arm.config.to_dict()} if arm.config else {}, "backend": arm.backend,
            "presets": dict(arm.presets), **machine(CPU, self.dtype),
        }  # fmt: skip


def spelled(config: SparseConfig) -> str:
    """Return a method's name with what it sets: ``sol, beta 1``; ``min_tokens`` stands with the presets' rule."""
    usual = type(config)().to_dict()
    said = [
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in config.to_dict().items()
        if value is not None and name != "min_tokens" and value != usual.get(name)
    ]
    return ", ".join([config.name, *said])


def main(arguments: Sequence[str] | None = None) -> int:
    """Append a JSON line for each arm, shape and dtype, from the shortest sequence to the longest."""
    return study(
        __doc__, arguments, measure, page_text, out="attention-shapes.jsonl", resumes=True, threads=2, shapes="all",
        heads=1, rounds=3, budget=1500.0,
    )  # fmt: skip


def measure(options: Any, known: Sequence[Line]) -> Iterator[Line]:
    """Give the lines of all calls; those for which the budget of seconds has no time left say so."""
    deadline = time.perf_counter() + options.budget
    calls = [
        Attention(shape=shape, heads=options.heads, dtype=dtype, rate=dense_rate(dtype))
        for dtype in (torch.float32, torch.bfloat16)
        for shape in named_shapes(options.shapes)
    ]
    calls.sort(key=lambda one: one.expected(one.arms[0]))
    needed = [[one.expected(arm) for arm in one.arms] for one in calls]
    for number, (one, seconds) in enumerate(zip(calls, needed, strict=True)):
        fits = int((np.cumsum(seconds) <= deadline - time.perf_counter()).sum())
        if fits:
            yield from timed(one, one.arms[:fits], options.rounds, deadline - sum(map(sum, needed[number + 1 :])))
        for arm, took in zip(one.arms[fits:], seconds[fits:], strict=True):
            why = f"would take about {took:,.0f} s more than a budget of {options.budget:,.0f} s has left"
            yield one.about(arm) | {"reason": why}


@torch.no_grad()
def timed(one: Attention, arms: Sequence[Arm], rounds: int, deadline: float) -> Iterator[Line]:
    """Give the lines of arms that take turns, dense first; an arm that fails is left out with its error."""
    (_, family), layout = one.of, one.layout
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, one.heads, layout.tokens, family.head_dim).to(one.dtype) for _ in range(3))
    rest = other_flops(family, layout) / feed_forward_rate(family, one.dtype)
    first = slice(PROBE_TOKENS)
    scaled_dot_product_attention(q[:, :, first], k[:, :, first], v[:, :, first])  # warms up
    dense, *sparse = arms
    runs: dict[str, Callable[[], Any]] = {dense.name: lambda: scaled_dot_product_attention(q, k, v)}
    found: dict[str, Line] = {dense.name: {"density": 1.0}}
    for arm in sparse:
        run = partial(sparse_call, *handler_of(arm, one), q, k, v)
        reason = why_not(lambda: found.update({arm.name: shares(*run(), q)}))  # noqa: B023 - called at once
        if reason is None:
            runs[arm.name] = run
        else:
            yield one.about(arm) | {"reason": reason}
    takes = {name: partial(call_seconds, run, CPU) for name, run in runs.items()}
    taken = list(in_turn(takes, rounds, warm_up=0, deadline=deadline))
    seconds = {name: np.array([made[name] for made in taken]) for name in runs}
    for arm in arms:
        if arm.name in runs:
            figures = figures_of(one, arm, rest, seconds[arm.name], seconds[dense.name])
            yield one.about(arm) | found[arm.name] | figures


def handler_of(arm: Arm, one: Attention) -> tuple[AttentionHandler, CallContext, str]:
    """Return the method of an arm, where its call stands, and the backend: the first arguments of `sparse_call`."""
    assert arm.acting is not None
    assert arm.backend is not None
    (handler,) = make_handlers([arm.acting], one.model(one.heads))
    assert isinstance(handler, AttentionHandler)
    steps = one.of[1].num_inference_steps
    context = CallContext(
        transformer="transformer", branch="cond", step_index=steps // 2, num_inference_steps=steps, sigma=None,
        layout=one.layout, batch=1, layer=0, depth=0, device=CPU,
    )  # fmt: skip
    return handler, context, arm.backend


def sparse_call(
    handler: AttentionHandler, context: CallContext, backend: str, q: Tensor, k: Tensor, v: Tensor
) -> tuple[AttentionPlan, Tensor, Tensor | None]:
    """Plan and run one call of q, k and v [B, H, S, D] as an attachment does: plan, output, and exact tiles as bits."""
    call = Call(q=q, k=k, v=v, backend=backend)
    plan = handler.plan(AttentionPlan(), call, context)
    tiles, arguments = plan.kernel_arguments(call)
    selects = plan.selection is not None
    result = block_sparse_attention_eager(q, plan.centred(k), v, tiles, **arguments, return_tiles=selects)
    return (plan, result, None) if isinstance(result, Tensor) else (plan, result[0], result[1])


def shares(plan: AttentionPlan, _: Tensor, exact: Tensor | None, q: Tensor) -> Line:
    """Return a call's density, and what the kernels' own table predicts of it."""
    tiles = plan.tiles
    assert tiles is not None
    if exact is not None:
        sides = {name: getattr(tiles, name) for name in ("block_q", "block_k", "num_q", "num_k")}
        tiles = TileLists.from_states(
            unpack_bits(exact, tiles.key_tiles).flatten(0, 1).to(torch.uint8) * EXACT, **sides
        )
    return {"density": tiles.density, "predicted_by_table": predicted_speedup(q.device, q.dtype, tiles)}


def figures_of(one: Attention, arm: Arm, rest: float, seconds: np.ndarray, dense: np.ndarray) -> Line:
    """Return an arm's times, what plan predicts, and what a whole block and a run would gain by it.

    ``rest_seconds`` is a block without its self-attention, ``dense_share`` that of the calls of a run of the model's
    usual steps which the preset leaves dense.
    """
    scale = one.of[1].heads / one.heads
    whole, whole_dense = (rest + float(np.median(took)) * scale for took in (seconds, dense))
    line: Line = {
        "rounds": len(seconds), "seconds": quartiles(seconds), "ratio": quartiles(dense / seconds),
        "rest_seconds": rest, "block_ratio": whole_dense / whole,
    }  # fmt: skip
    if arm.config is None or arm.acting is None:
        return line
    calls, run = one.with_methods(arm.acting), one.with_methods(replace(arm.config, min_tokens=None))
    return line | {
        "pair_density": calls.pair_density, "predicted": 1 / (calls.pair_density * calls.cost_of_pairs),
        "min_tokens": arm.config.min_tokens, "dense_share": run.dense_share,
    }  # fmt: skip


def rate_of(flops: float, run: Callable[[], object]) -> float:
    """Return the FLOP/s of a call, by the median of three."""
    return flops / float(np.median([one[""] for one in in_turn({"": partial(call_seconds, run, CPU)}, 3)]))


def dense_rate(dtype: torch.dtype) -> float:
    """Return the FLOP/s of dense attention over a short sequence."""
    q, k, v = (torch.randn(1, 1, PROBE_TOKENS, 128).to(dtype) for _ in range(3))
    return rate_of(4 * PROBE_TOKENS**2 * 128, lambda: scaled_dot_product_attention(q, k, v))


@torch.no_grad()
def feed_forward_rate(family: Family, dtype: torch.dtype) -> float:
    """Return the FLOP/s of the model's feed-forward over `SLICE` tokens, with random weights."""
    width, hidden = family.heads * family.head_dim, family.ffn_dim
    up, down = nn.Linear(width, hidden, dtype=dtype), nn.Linear(hidden, width, dtype=dtype)
    layers, x = nn.Sequential(up, nn.GELU("tanh"), down), torch.randn(SLICE, width, dtype=dtype)
    return rate_of(4 * SLICE * width * hidden, lambda: layers(x))


if __name__ == "__main__":
    raise SystemExit(main())
