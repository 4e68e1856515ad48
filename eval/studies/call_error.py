"""Measures how far each planned attention call is from dense attention: `python eval/studies/call_error.py`.

Every call of a run of an embedded model is planned by the method on the queries, keys and values of the dense run: its
output is replaced by the dense one before the model goes on. Told are the relative error of the output and the softmax
mass that lies outside exact tiles, over the density, beside the best that any choice of as many tiles could do: in each
row of tiles those of the largest mass, the others skipped or pooled. Figures are means over calls that follow a plan.
"""

import argparse
import contextlib
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dit_accel_assets import model_names
from dit_accel_eval.runs.loaded import EmbeddedModel, weights_hash
from dit_accel_eval.runs.results import Line, append_line, markdown_table, read_lines
from dit_accel_kernels import EXACT, TileLists
from torch import Tensor, nn

import dit_accel
from dit_accel.attachment.layers import PlannedCall
from dit_accel.errors import ConfigError, DitAccelError, did_you_mean
from dit_accel.files import written_whole
from dit_accel.methods.config import MethodConfig
from dit_accel.methods.find import attention_modules
from dit_accel.testing.reference import tile_states, tiles_of

OUT = Path(__file__).parents[1] / "results" / "call-error.jsonl"
TILE = 16
"""Tokens of a tile."""

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
"""At which the best choice of tiles is given."""

STEPS = 8


def _radial(**options: Any) -> MethodConfig:
    given = {"block_size": TILE, "near": "half", "dense_steps": 0, "dense_last_steps": 0, "dense_layers": 0, **options}
    return dit_accel.RadialAttention(**given)


def _arms() -> dict[str, tuple[MethodConfig, ...]]:
    """Return name -> methods: every sparse method at several settings, what it drops skipped or pooled."""
    arms: dict[str, tuple[MethodConfig, ...]] = {}
    for rest in ("skip", "pooled"):
        end = "" if rest == "skip" else ", pooled"
        for factor in (0.2, 1.0, 4.0):
            arms[f"radial {factor:g}{end}"] = (_radial(decay_factor=factor, rest=rest),)
        for threshold in (-2.0, -4.0, -6.0):
            lite = dit_accel.LiteAttention(threshold=threshold, block_size=TILE, dense_steps=0, rest=rest)
            arms[f"lite {threshold:g}{end}"] = (lite,)
        for density in (0.15, 0.3, 0.5):
            sparsed = dit_accel.SparseD(density=density, block_size=TILE, rest=rest)
            arms[f"sparsed {density:g}{end}"] = (sparsed,)
    for beta in (-0.5, 0.0, 0.46):
        arms[f"sol {beta:g}, pooled"] = (dit_accel.SolAttention(beta=beta, block_size=TILE),)
    return arms


ARMS = _arms()
"""Name -> what is attached."""

BEST = "best choice of tiles"
"""The arm whose lines tell, for each of `DENSITIES`, what the best choice of tiles comes to."""

NAMES = ("density", "error", "lost", "best_error", "best_pooled_error", "best_lost")
"""What is measured of a call; the last three of the best choice of as many tiles in each row."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what ``--out`` does not hold yet, a JSON line for each arm and clip, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["wan-tiny", "flux-tiny"])
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--arms", nargs="+", default=[BEST, *ARMS])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--plot", type=Path, help="PNG of the curves")
    options = parser.parse_args(arguments)
    for given, known in ((options.models, model_names()), (options.arms, [BEST, *ARMS])):
        for name in given:
            if name not in known:
                raise SystemExit(f"there is no {name!r}; {did_you_mean(name, known)}")
    torch.set_num_threads(1)
    try:
        for model in options.models:
            for line in measure(model, options.clips, options.arms, read_lines(options.out)):
                append_line(options.out, line)
                print(f"{model}, clip {line['clip']}, {line['arm']}: {line['error']:.3f}", file=sys.stderr)
    except DitAccelError as error:
        print(error, file=sys.stderr)
        return 2
    lines = read_lines(options.out)
    print(table(lines))
    if options.plot:
        plot(lines, options.plot)
    return 0


def measure(name: str, clips: int, arms: Sequence[str], known: Sequence[Line]) -> Iterator[Line]:
    """Give a line for each clip and arm of a model that is not ``known``; arms that the model refuses are left out.

    Args:
        name: of the embedded model.
        clips: held-out prompts, with their numbers as seeds.
        arms: of `ARMS`, or `BEST`.
        known: lines of an earlier run.

    Raises:
        ConfigError: if the known lines are of other weights.
    """
    weights = weights_hash(name)
    of_model = [line for line in known if line["model"] == name]
    if any(line["weights"] != weights for line in of_model):
        raise ConfigError(f"the lines of {name} are of other weights than {weights}; give another --out")
    done = {(line["arm"], line["clip"]) for line in of_model}
    model = EmbeddedModel(name, {})
    for clip in range(clips):
        for arm in arms:
            if (arm, clip) in done or (arm != BEST and _refusal(model, ARMS[arm])):
                continue
            shared = {
                "model": name, "weights": weights, "arm": arm, "clip": clip, "steps": STEPS, "tile": TILE,
                "torch": torch.__version__,
            }  # fmt: skip
            for found in of_calls(model, clip, arm):
                yield {**shared, **found}


def of_calls(model: EmbeddedModel, clip: int, arm: str) -> list[Line]:
    """Return the means over the planned calls of one run: one line, or of `BEST` one for each density."""
    methods = (dit_accel.SolAttention(beta=0.0, block_size=TILE),) if arm == BEST else ARMS[arm]
    found: dict[float | None, list[tuple[float, ...]]] = {}

    def note(planned: PlannedCall) -> None:
        wanted = DENSITIES if arm == BEST else (None,)
        for density, numbers in zip(wanted, figures(planned, wanted), strict=True):
            found.setdefault(density, []).append(numbers)

    dense = [_plain(module) for module in _modules(model)]
    with (
        dit_accel.attach(model.pipe, *methods, preset="none") as attachment,
        attachment.observe(note),
        _flowing(model, dense),
    ):
        model.run(clip, steps=STEPS, solver="unipc")
    return [
        {"calls": len(calls), **dict(zip(NAMES, np.mean(calls, 0).tolist(), strict=True))} for calls in found.values()
    ]


@torch.no_grad()
def figures(planned: PlannedCall, densities: Sequence[float | None] = (None,)) -> list[tuple[float, ...]]:
    """Return what `NAMES` says of one call, once for each density.

    Args:
        planned: the call.
        densities: shares of each row's tiles in the best choice; None: as many as the plan has exact there.
    """
    plan, call = planned.plan, planned.call
    tiles, order = tiles_of(plan, call.q.shape[2]), plan.token_order
    states = tile_states(plan, call.q.shape[1], call.q.shape[2], planned.exact)
    kept = (states == EXACT).expand(len(call.q), call.q.shape[1], -1, -1)
    out = planned.out if planned.planned is None else planned.planned
    q, k, v, out = (x.float() if order is None else x[:, :, order].float() for x in (call.q, call.k, call.v, out))
    choice = Choice.of(q, k, v, tiles, call.scale)
    rank, error, found = choice.mass.argsort(-1, descending=True).argsort(-1), choice.error(out), []
    for density in densities:
        count = kept.sum(-1, keepdim=True).clamp(min=1) if density is None else max(1, round(density * tiles.key_tiles))
        best = rank < count
        share = float((kept if density is None else best).float().mean())
        skipped, pooled = (choice.error(choice.made_of(best, pools)) for pools in (False, True))
        found.append((share, error, choice.lost(kept), skipped, pooled, choice.lost(best)))
    return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Choice:
    """One call of dense attention, of which some tiles can be chosen; tokens in the order of the tiles.

    Attributes:
        weights: unnormalised softmax weights [B, H, S, S].
        pooled: the same of each key tile's mean key, times its tokens, [B, H, S, NK].
        v: values [B, H, S, D].
        v_mean: mean value of each key tile, [B, H, NK, D].
        mass: softmax mass that the rows of each query tile put on each key tile, summed, [B, H, NQ, NK].
        right: the dense output [B, H, S, D].
        sizes: tokens of a query tile, and of a key tile.
    """

    weights: Tensor
    pooled: Tensor
    v: Tensor
    v_mean: Tensor
    mass: Tensor
    right: Tensor
    sizes: tuple[int, int]

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, tiles: TileLists, scale: float | None) -> "Choice":
        """Return the choice of a call of q, k and v, [B, H, S, D]."""
        factor: float = q.shape[-1] ** -0.5 if scale is None else scale
        short = tiles.key_tiles * tiles.block_k - k.shape[2]
        length = torch.full((tiles.key_tiles,), float(tiles.block_k))
        length[-1] -= short
        k_mean, v_mean = (
            nn.functional.pad(x, (0, 0, 0, short)).unflatten(2, (-1, tiles.block_k)).sum(3) / length[:, None]
            for x in (k, v)
        )
        logits, of_means = q @ k.mT * factor, q @ k_mean.mT * factor + length.log()
        top = torch.maximum(logits.amax(-1, keepdim=True), of_means.amax(-1, keepdim=True))
        weights = (logits - top).exp()
        total = weights.sum(-1, keepdim=True)
        rows = tiles.query_tiles * tiles.block_q - q.shape[2]
        split = nn.functional.pad(weights / total, (0, short, 0, rows)).unflatten(-1, (-1, tiles.block_k)).sum(-1)
        return cls(
            weights=weights, pooled=(of_means - top).exp(), v=v, v_mean=v_mean, right=weights @ v / total,
            mass=split.unflatten(2, (-1, tiles.block_q)).sum(3), sizes=(tiles.block_q, tiles.block_k),
        )  # fmt: skip

    def made_of(self, chosen: Tensor, pools: bool) -> Tensor:
        """Return the output of exact tiles, bool [B, H, NQ, NK], the others skipped or each one key."""
        tokens = self.weights.shape[2]
        rows = chosen.repeat_interleave(self.sizes[0], 2)[:, :, :tokens]
        weights = self.weights * rows.repeat_interleave(self.sizes[1], 3)[..., :tokens]
        out, total = weights @ self.v, weights.sum(-1, keepdim=True)
        if pools:
            pooled = self.pooled * ~rows
            out, total = out + pooled @ self.v_mean, total + pooled.sum(-1, keepdim=True)
        return out / total.clamp(min=torch.finfo(total.dtype).tiny)  # a row without tiles gives 0

    def error(self, out: Tensor) -> float:
        """Return how far an output is from the dense one, relative to its size."""
        return float((out - self.right).norm() / self.right.norm())

    def lost(self, chosen: Tensor) -> float:
        """Return the share of the softmax mass that lies outside chosen tiles."""
        return float(1 - (self.mass * chosen).sum() / self.mass.sum())


def table(lines: Sequence[Line]) -> str:
    """Return a Markdown table, a row for each arm and model: means over clips."""
    heads = "model | arm | clips | density | relative error | best choice, skipped | best choice, pooled | mass lost"
    rows = []
    for (model, arm), of in _grouped(lines).items():
        if arm != BEST:
            density, *rest = (float(np.mean([line[key] for line in of])) for key in NAMES)
            error, lost, best, pooled, best_lost = (f"{value:.3f}" for value in rest)
            rows.append((model, arm, len(of), f"{density:.2f}", error, best, pooled, lost, best_lost))
    first = lines[0]
    head = f"{first['steps']} UniPC steps, tiles of {first['tile']} tokens, torch {first['torch']}."
    return f"{head}\n\n{markdown_table(f'{heads} | by the best choice', rows)}"


def plot(lines: Sequence[Line], path: Path) -> None:
    """Draw relative error over density, a panel a model: every method, and the best choice of tiles."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(line["model"] for line in lines))
    figure = Figure(figsize=(2.5 + 5 * len(models), 5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    families = list(dict.fromkeys(arm.split()[0] for arm in ARMS))
    for panel, model in zip(panels, models, strict=True):
        grouped = {arm: of for (name, arm), of in _grouped(lines).items() if name == model}
        best = [(line["density"], line["best_error"], line["best_pooled_error"]) for line in grouped.pop(BEST, [])]
        across = sorted({round(density, 3) for density, *_ in best})
        for place, label, look in ((1, "best choice, skipped", "k-"), (2, "best choice, pooled", "k--")):
            up = [np.mean([one[place] for one in best if round(one[0], 3) == density]) for density in across]
            panel.plot(across, up, look, label=label)
        for number, family in enumerate(families):
            for end, look in (("", "o-"), (", pooled", "s--")):
                arms = [arm for arm in grouped if arm.split()[0] == family and arm.endswith(", pooled") == bool(end)]
                points = sorted(
                    tuple(float(np.mean([line[key] for line in grouped[arm]])) for key in ("density", "error"))
                    for arm in arms
                )
                if points:
                    panel.plot(
                        *zip(*points, strict=True), look, color=f"C{number}", label=f"{family}{end}", markersize=5
                    )
        panel.set_title(model)
        panel.set_xlabel("share of tiles that are exact")
        panel.set_yscale("log")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("relative error of a call's output")
    entries = {}
    for panel in panels:  # a model that refuses a method has no curve of it
        handles, labels = panel.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries.keys(), fontsize=8, loc="outside right center")
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _grouped(lines: Sequence[Line]) -> dict[tuple[str, str], list[Line]]:
    grouped: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        grouped.setdefault((line["model"], line["arm"]), []).append(line)
    return grouped


def _refusal(model: EmbeddedModel, methods: tuple[MethodConfig, ...]) -> bool:
    try:
        dit_accel.attach(model.pipe, *methods, preset="none").detach()
    except ConfigError:
        return True
    return False


def _modules(model: EmbeddedModel) -> list[nn.Module]:
    return [module for _, module, _ in attention_modules(model.pipe.transformer, model.adapter)]


def _plain(module: nn.Module) -> nn.Module:
    """Return a copy of a module that calls its class's own forward, not the one that counts the original's calls."""
    plain = copy.deepcopy(module)
    plain.__dict__.pop("forward", None)
    return plain


@contextlib.contextmanager
def _flowing(model: EmbeddedModel, dense: Sequence[nn.Module]) -> Iterator[None]:
    """Let the run go on with what copies of its attention modules give that were made before anything was attached."""

    def given_by(module: nn.Module) -> Callable[..., Any]:
        return lambda _, args, kwargs, out: module(*args, **kwargs)

    hooks = [
        module.register_forward_hook(given_by(own), with_kwargs=True)
        for module, own in zip(_modules(model), dense, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


if __name__ == "__main__":
    raise SystemExit(main())
