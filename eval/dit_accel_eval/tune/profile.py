"""Profiles a model's blocks for ProfilingCache: which attend to the background, or hardly change, on its generations.

Source: the profiling of ProfilingDiT (arXiv 2504.03140), whose code was not released. Where we depart from it: no
segmenter, the foreground is what moves in the predicted picture; attention is streamed, and of long clips read off a
sample of the queries; other criteria, since which blocks attend to what need not tell which can be cached.
"""

import contextlib
import importlib.metadata
import inspect
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dit_accel_pipelines.generation.progress import Stages
from torch import Tensor

from dit_accel import ConfigError
from dit_accel.adapters.blocks import block_signature
from dit_accel.attachment.layers import PlannedCall, TransformerState
from dit_accel.attachment.site import find_blocks
from dit_accel.errors import did_you_mean
from dit_accel.files import write_json
from dit_accel.methods.caches.block_numbers import spell_numbers
from dit_accel.methods.caches.easy import mean_size
from dit_accel.methods.caches.profile_file import VERSION, weights_digest
from dit_accel.methods.find import find_transformers, resolve_model
from dit_accel.methods.site import Block, target_sample
from dit_accel.rules.foreground import foreground, predicted

from ..runs.loaded import TuningRequest
from .base import Tuned, TuningRun, run_settings, watched_attention

CRITERIA = ("attention", "delta", "error")
"""What blocks are judged by. ``attention``: the share of the foreground that receives more attention than the mean
token. ``delta``: how much what the block adds changed since the last step, over what it adds. ``error``: the same over
the last block's stream. Blocks of low scores are cached."""

SCORES = 2**24  # logits that are held at a time
QUERIES = 4096  # the most queries of a call that are looked at, chosen at random; of fewer, all


class Profiler:
    """Notes what a run's blocks do, in the first branch of each step."""

    def __init__(self, attachment: Any, attention: bool) -> None:
        self._attachment, self._attention = attachment, attention
        self.engine, self.denoising = attachment.engine, attachment.denoising
        self._states: dict[str, TransformerState] = {layer.state.name: layer.state for layer in self.engine.layers}
        self._blocks = {name: find_blocks(state.adapter, state.transformer) for name, state in self._states.items()}
        self._of_layer = {name: self._layers(name) for name in self._states}
        self.names = {name: [block.name for block in blocks] for name, blocks in self._blocks.items()}
        self._clear()

    def _clear(self) -> None:
        self.scores: dict[str, dict[str, dict[tuple[int, int], float]]] = defaultdict(lambda: defaultdict(dict))
        self.foreground: dict[int, float] = {}
        self._leading: dict[tuple[str, int], str] = {}
        self._received: dict[int, list[Tensor]] = defaultdict(list)
        self._now: dict[int, Tensor] = {}
        self._last: dict[tuple[str, int], tuple[int, Tensor]] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the run inside the block."""
        self._clear()
        with contextlib.ExitStack() as stack:
            stack.enter_context(watched_attention(self._attachment, self._attended))
            for name, state in self._states.items():
                for block in self._blocks[name]:
                    hook = partial(self._added, name, block)
                    stack.callback(block.module.register_forward_hook(hook, with_kwargs=True).remove)
                names = list(inspect.signature(type(state.transformer).forward).parameters)[1:]
                hook = partial(self._ended, name, names)
                stack.callback(state.transformer.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def _layers(self, name: str) -> dict[int, int]:
        """Return layer index -> block index of a transformer."""
        blocks, state = {}, self._states[name]
        names = {id(module): path for path, module in state.transformer.named_modules()}
        for layer in state.layers:
            path = names[id(layer.module)]
            owner = next((b for b in self._blocks[name] if path.startswith(f"{b.name}.") or path == b.name), None)
            if owner is not None:
                blocks[layer.index] = owner.index
        return blocks

    def _leads(self, name: str) -> bool:
        """Tell whether the running branch is the first of its step."""
        state = self._states[name]
        key = name, self.denoising.step_index
        return self._leading.setdefault(key, state.branch) == state.branch

    def _attended(self, planned: PlannedCall) -> None:
        call, context = planned.call, planned.context
        block, layout = self._of_layer[context.transformer].get(context.layer), context.layout
        if block is None or layout.frames == 1 or not self._leads(context.transformer):
            return
        rows = torch.arange(layout.visual_tokens)
        if len(rows) > QUERIES:
            rows = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:QUERIES]
        rows = (rows + layout.visual.start).to(call.q.device)
        received = attention_received(call.q, call.k, scale=call.scale, key_mask=call.key_mask(), rows=rows)
        self._received[block].append(received[layout.visual])

    def _added(self, name: str, block: Block, module: Any, args: Any, kwargs: Any, result: Any) -> None:
        if not self._leads(name):
            return
        signature = block_signature(block.list, type(module))
        before, after = signature.read_call(args, kwargs)[0], signature.read_result(result)[0]
        assert before is not None
        assert after is not None
        step, scores = self.denoising.step_index, self.scores[name]
        added = (after.detach() - before.detach()).float()
        known = self._last.get((name, block.index))
        if known is not None and known[1].shape == added.shape and known[0] < step:
            change, size = mean_size(added - known[1]), mean_size(added)
            scores["delta"][block.index, step] = float(change / size)
            self._now[block.index] = change
        self._last[name, block.index] = step, added
        if block.index == len(self._blocks[name]) - 1:
            whole = mean_size(after.detach())
            for index, change in self._now.items():
                scores["error"][index, step] = float(change / whole)
            self._now.clear()

    def _ended(self, name: str, names: Sequence[str], module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if not self._leads(name):
            return
        step, inputs = self.denoising.step_index, {**dict(zip(names, args, strict=False)), **kwargs}
        mask = self._mask(self._states[name], inputs, output)
        if mask is not None:
            self.foreground[step] = float(mask.mean())
            for block, received in self._received.items():
                values = torch.stack(received).mean(0).cpu().numpy().reshape(mask.shape)
                if (ratio := foreground_ratio(values, mask)) == ratio:
                    self.scores[name]["attention"][block, step] = ratio
        self._received.clear()

    def _mask(self, state: TransformerState, inputs: Any, output: Any) -> np.ndarray | None:
        """Return the foreground of a step, bool [F, Y, X]; None where it can't be found, which may be an error."""
        layout, sigma = self.engine.forward.layout, self.denoising.context(state).sigma
        if layout is None:
            why = f"can't tell {state.name}'s tokens in this call"
        elif layout.frames == 1:
            why = "finds the foreground by what moves, and an image does not"
        elif sigma is None or not 0 <= sigma <= 1:
            why = f"reads it off a flow model's prediction, and the scheduler tells the noise level {sigma}"
        else:
            x, v = target_sample(inputs[state.adapter.latents]), target_sample(output)
            grid = layout.frames, layout.height, layout.width
            clean = predicted(x, v, sigma, grid, layout.text_before, layout.text_after)
            if clean is not None:
                return foreground(clean).cpu().numpy()
            why = f"can't lay what {state.name} predicts on its {grid[0]} x {grid[1]} x {grid[2]} tokens"
        if self._attention:
            raise ConfigError(f"tune profile {why}; use --criterion error or delta, which take no foreground")
        return None


def attention_received(
    q: Tensor, k: Tensor, *, scale: float | None = None, key_mask: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    """Return what each key receives of the queries' attention, float32 [S], which sum to 1; no matrix is held.

    Source: ProfilingDiT (arXiv 2504.03140), a_i = mean_j A_ji of the row softmax A; mean over heads and batch too.
    """
    batch, heads, queries, size = q.shape
    looked = torch.arange(queries, device=q.device) if rows is None else rows
    factor = size**-0.5 if scale is None else scale
    chunk = max(1, SCORES // (heads * k.shape[2]))
    total = torch.zeros(k.shape[2], dtype=torch.float64, device=q.device)
    for b in range(batch):
        wide = k[b].repeat_interleave(heads // k.shape[1], 0).float()
        for part in looked.split(chunk):
            logits = (q[b, :, part].float() @ wide.mT) * factor
            if key_mask is not None:
                logits = logits.masked_fill(~key_mask[b], -torch.inf)
            total += logits.softmax(-1).mean(0).double().sum(0)
    return (total / (batch * len(looked))).float()


def foreground_ratio(received: np.ndarray, foreground: np.ndarray) -> float:
    """Return the share of the foreground's tokens that receive more attention than the mean token, mean over frames.

    Source: ProfilingDiT (arXiv 2504.03140), whose threshold is not published: here the mean. NaN without foreground.
    """
    high, inside = received > received.mean(), foreground.reshape(len(foreground), -1)
    counts = inside.sum(1)
    both = (high.reshape(inside.shape) & inside).sum(1)
    return float((both[counts > 0] / counts[counts > 0]).mean()) if counts.any() else float("nan")


def tune_profile(
    request: TuningRequest, output: Path, *, criterion: str = "error", cached: int | None = None,
    stages: Stages | None = None,
) -> Tuned:  # fmt: skip
    """Profile the blocks on every prompt, for `ProfilingCache.blocks`; step caches are refused."""
    if criterion not in CRITERIA:
        raise ConfigError(f"there is no criterion {criterion!r}; {did_you_mean(criterion, CRITERIA)}")
    if cached is not None and cached < 1:
        raise ConfigError(f"tune profile's cached must be >= 1, got {cached}")
    runs = TuningRun(request, output, ".json", stages)
    with runs.attached() as attachment:
        profiler = Profiler(attachment, criterion == "attention")
        skipping = (handler.name for handler in attachment.engine.handlers if "cache" in handler.exclusive)
        if (skips := next(skipping, None)) is not None:
            raise ConfigError(f"tune profile watches every block at each step, and {skips} skips some; leave it out")
        for name, blocks in profiler.names.items():
            if cached is not None and cached > len(blocks):
                has = f"{name} has {len(blocks)} blocks"
                raise ConfigError(f"tune profile's cached = {cached}, and {has}; ask for fewer")

        def profiled(prompt: str) -> dict[str, Any]:
            with profiler.watching():
                runs.run(prompt)
            blocks = {name: range(len(listed)) for name, listed in profiler.names.items()}
            return {
                "prompt": prompt, "foreground": [share for _, share in sorted(profiler.foreground.items())],
                "transformers": {
                    name: {criterion: _matrix(scores[criterion], blocks[name]) for criterion in CRITERIA}
                    for name, scores in profiler.scores.items()
                },
            }  # fmt: skip

        parts = runs.over_prompts(profiled)
    transformers = find_transformers(runs.pipe)
    content = {
        "profile": VERSION, "model": resolve_model(next(iter(transformers)), transformers).name,
        "criterion": criterion, "cached": cached, "settings": run_settings(runs),
        "versions": {name: importlib.metadata.version(name) for name in ("dit-accel", "torch", "diffusers")},
        "runs": [{"prompt": part["prompt"], "foreground": part["foreground"]} for part in parts],
        "transformers": {
            name: {
                "weights": weights_digest(module), "names": profiler.names[name], "blocks": len(profiler.names[name]),
                **_entry(name, parts, criterion, cached),
            }
            for name, module in transformers.items()
        },
    }  # fmt: skip
    write_json(output, content)
    runs.finish()
    return _tuned(content)


def _matrix(values: Mapping[tuple[int, int], float], blocks: range) -> list[list[float | None]]:
    """Return the values by block and step, None where there is none."""
    steps = 1 + max((step for _, step in values), default=-1)
    return [[values.get((block, step)) for step in range(steps)] for block in blocks]


def _entry(name: str, parts: Sequence[Mapping[str, Any]], criterion: str, cached: int | None) -> dict[str, Any]:
    """Return what all runs say about one transformer."""
    seen = [part["transformers"][name] for part in parts if name in part["transformers"]]
    if not seen:
        raise ConfigError(f"{name} never ran; show something for which it does, or ask for more steps")
    by_step = {kind: mean_of_known([np.array(entry[kind], float) for entry in seen]) for kind in CRITERIA}
    scores = {kind: mean_of_known([*values.T]) if values.size else np.full(len(values), np.nan)
              for kind, values in by_step.items()}  # fmt: skip
    if np.isnan(scores[criterion]).all():
        raise ConfigError(
            f"tune profile found nothing to tell {name}'s blocks apart by {criterion!r}: no foreground, or too few "
            "steps; show something that moves, or use another criterion"
        )
    blocks, edge = cached_blocks(scores[criterion].tolist(), cached)
    return {
        "cached": blocks, "split_at": edge, "scores": {kind: _plain(values) for kind, values in scores.items()},
        "by_step": {kind: [*map(_plain, values)] for kind, values in by_step.items()},
    }  # fmt: skip


def _plain(values: np.ndarray) -> list[float | None]:
    """Return numbers as JSON has them: None for what is none."""
    return [None if np.isnan(value) else float(value) for value in values]


def _tuned(content: Mapping[str, Any]) -> Tuned:
    """Return the content with the blocks' scores by transformer as a table, and what they say together."""
    rows: list[tuple[str, ...]] = []
    remarks: list[str] = []
    for name, entry in content["transformers"].items():
        for block, scores in enumerate(zip(*(entry["scores"][kind] for kind in CRITERIA), strict=True)):
            spelt = ("" if score is None else f"{score:.3f}" for score in scores)
            rows.append((name, str(block), *spelt, "cached" if block in entry["cached"] else ""))
        remarks.append(f"{name}: blocks {spell_numbers(entry['cached']) or 'none'} may be cached")
    columns = ("transformer", "block", *CRITERIA, content["criterion"])
    return Tuned(found=content, columns=columns, rows=rows, remarks=remarks)


def cached_blocks(scores: Sequence[float], count: int | None = None) -> tuple[list[int], float]:
    """Return the blocks of lowest scores, ``count`` or all below the largest gap, and the threshold above them."""
    known = sorted((score, block) for block, score in enumerate(scores) if score == score)
    if count is None:
        gaps = [high[0] - low[0] for low, high in itertools.pairwise(known)]
        count = 1 + int(np.argmax(gaps)) if gaps else 0
    edges = [entry[0] for entry in known[max(count - 1, 0) : count + 1]] or [0.0]
    return sorted(block for _, block in known[:count]), float(np.mean(edges))


def mean_of_known(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mean of arrays, of what is a number; NaN where none is. They are cut to the shortest's steps."""
    steps = min(array.shape[-1] for array in arrays)
    stacked = np.stack([array[..., :steps] for array in arrays])
    known = ~np.isnan(stacked)
    return np.where(known.any(0), np.nansum(stacked, 0) / np.maximum(known.sum(0), 1), np.nan)
