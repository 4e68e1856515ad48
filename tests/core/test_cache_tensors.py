"""Tensors are the caller's: loops that write into latents and outputs, shapes that change midway, on every cache."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from block_calls import six_blocks
from cache_calls import ADAPTER, Driven, run_through
from torch import Tensor
from torch.utils._pytree import tree_leaves

import dit_accel
from dit_accel import (
    ConfigError,
    DBCache,
    DBPrune,
    EasyCache,
    FirstBlockCache,
    MagCache,
    ProfilingCache,
    StaticCache,
    TeaCache,
)  # fmt: skip
from dit_accel.attachment.layers import RememberedTensors
from dit_accel.methods.base import Model
from dit_accel.methods.caches.cache_config import MeasuredCacheConfig
from dit_accel.methods.caches.engine import Decider, StepCacheHandler
from dit_accel.methods.caches.history import own_copies

STEPS = 10
ALL = dict(warmup_steps=1, last_steps=1)
CACHES = {
    "easycache": EasyCache(threshold=0.3, **ALL),
    "easycache, error": EasyCache(error=0.5, predictor="taylor", **ALL),
    "teacache": TeaCache(threshold=2.0, polynomial=(1.0, 0.0), **ALL),
    "magcache": MagCache(ratios=(1.0,) + (0.98,) * (STEPS - 1), **ALL),
    "staticcache": StaticCache(every=3, stored="output", **ALL),
    "firstblockcache": FirstBlockCache(threshold=0.5, **ALL),
    "dbcache": DBCache(threshold=0.5, first_blocks=2, last_blocks=1, **ALL),
    "dbprune": DBPrune(threshold=0.05, **ALL),
    "profilingcache": ProfilingCache(blocks="1-3", every=3, warmup_steps=1, last_steps=1),
}


def plainly(x: Tensor, v: Tensor) -> Tensor:
    return x - 0.02 * v


def latents_in_place(x: Tensor, v: Tensor) -> Tensor:
    return x.sub_(0.02 * v)


def output_in_place(x: Tensor, v: Tensor) -> Tensor:
    return x - v.mul_(0.02)


def rows_in_place(x: Tensor, v: Tensor) -> Tensor:
    x[:] = x - 0.02 * v
    return x


def denoised(model: Any, move: Any = plainly, rows: tuple[int, ...] = (1,) * STEPS) -> list[tuple[Tensor, Tensor]]:
    """Return the latents and output of each step of a hand-written loop; ``rows`` are the batch's, step by step."""
    x, text = torch.randn(rows[0], 12, 2, 8, 8, generator=seeded(0)), prompts(rows[0])
    seen = []
    for step, count in enumerate(rows):
        x = x[:count]
        with torch.no_grad(), model.cache_context("cond", step_index=step, num_inference_steps=len(rows)):
            v = model(x, torch.full((count,), 1000.0 - 50 * step), text[:count], return_dict=False)[0]
        seen.append((x.clone(), v.clone()))
        x = move(x, v)
    return seen


def prompts(count: int) -> Tensor:
    return torch.randn(count, 6, 64, generator=seeded(1))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def decided(attachment: Any) -> tuple[list[bool], list[float], Any]:
    """Return which forwards a cache reused, what it measured, and what share of the blocks ran."""
    data = attachment.report().sections[0].data
    values = [entry["value"] for entry in data["forwards"] if entry["value"] is not None]
    return [entry["reused"] for entry in data["forwards"]], values, data.get("computed_blocks")


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", CACHES)
def test_loops_that_write_in_place_are_cached_like_others(name):
    model = six_blocks()
    with dit_accel.attach(model, CACHES[name]) as attachment:
        expected = denoised(model)
        reused, values, blocks = decided(attachment)
        assert any(reused)
        assert blocks is None or blocks < 1
        for move in (latents_in_place, rows_in_place, output_in_place):
            for mode in (torch.no_grad(), torch.inference_mode()):
                with mode:
                    given = denoised(model, move)
                assert decided(attachment) == (reused, pytest.approx(values), blocks), (move, mode)
                for (_, one), (_, other) in zip(given, expected, strict=True):
                    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("rows", [(2,) * 5 + (1,) * 5, (4,) * 5 + (2,) * 5], ids=["2 to 1", "4 to 2"])
def test_rows_that_leave_midway_begin_anew(name, rows):
    """As where a callback switches guidance off: the first step with fewer rows is an untouched model's."""
    model = six_blocks()
    with dit_accel.attach(model, CACHES[name]) as attachment:
        seen = denoised(model, rows=rows)
        reused, _, _ = decided(attachment)
    assert not reused[5]
    assert any(reused[6:])
    x, given = seen[5]
    with torch.no_grad():
        expected = model(x, torch.full((rows[5],), 750.0), prompts(rows[0])[: rows[5]], return_dict=False)[0]
    assert torch.equal(given, expected)


def test_what_is_measured_after_fewer_rows_is_that_of_a_run_of_its_own():
    latents = [torch.randn(4, 3, 2, generator=seeded(step)) for step in range(12)]

    def measured(rows: list[int]) -> list[Any]:
        driven = Driven(EasyCache(threshold=0.5, warmup_steps=0, last_steps=0), lambda step, branch: None)
        start = 12 - len(rows)
        driven.output = lambda step, branch: (torch.sin(latents[start + step][: rows[step]]),)
        run_through(driven, lambda step: latents[start + step][: rows[step]], len(rows))
        return [(entry["reused"], entry["value"]) for entry in driven.handler.report().data["forwards"]]

    for before, after in ((4, 2), (2, 1)):
        assert measured([before] * 6 + [after] * 6)[6:] == measured([after] * 6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved(MeasuredCacheConfig):
    """A stranger's cache: a step is skipped where the latents moved little since the last one."""

    name = "moved"
    defaults = {"threshold": 0.5}  # noqa: RUF012


@dataclass
class MovedDecider(Decider):
    """It keeps what it is given as it is given, in whatever form."""

    inputs: dict[str, Any] | None = None
    outputs: list[Any] | None = None


class MovedHandler(StepCacheHandler):
    config_type = Moved
    decider_type = MovedDecider

    def indicator(self, context, decider):
        if decider.inputs is None:
            return None
        before, now = decider.inputs["hidden_states"], context.inputs["hidden_states"]
        assert torch.equal(decider.outputs[0], decider.of_them)
        return float((now - before).abs().mean())

    def seen(self, context, decider):
        decider.inputs = dict(context.inputs)

    def computed(self, context, decider, output):
        decider.outputs, decider.of_them = [output[0].view(-1)], output[0].flatten().clone()


def test_what_a_cache_of_a_stranger_keeps_is_copied_for_it():
    """Whatever it keeps of what it was given, and in fields that it never declared."""
    handler = MovedHandler(Moved(), Model(adapter=ADAPTER, family=None, heads=1, layers=1))
    driven = Driven(StaticCache(every=2), lambda step, branch: (torch.ones(1, 2, 3) * step,))
    driven.handler = handler
    x, reused = torch.zeros(1, 2, 3), ""
    for step in range(6):
        driven.forward(step, x)[0].mul_(-1)
        x.add_(0.1 if step != 2 else 1.0)
        reused += "." if (step, "cond") not in driven.ran else "#"
    assert reused == "#..#.."
    values = [entry["value"] for entry in handler.report().data["forwards"] if entry["value"] is not None]
    assert values == pytest.approx([0.1, 0.1, 1.0, 0.1, 0.1])
    decider = next(iter(handler._deciders.values()))
    assert decider.inputs["hidden_states"] is not x
    assert decider.nbytes == 3 * 24  # latents, output and its copy


def test_blocks_that_write_into_what_they_take_are_refused():
    profiling = ProfilingCache(blocks="1-3", **ALL)
    first, prune = FirstBlockCache(threshold=1.0, **ALL), DBPrune(threshold=1.0, **ALL)
    for cache, writing in ((first, 0), (first, 1), (prune, 1), (profiling, 1)):
        model = six_blocks()
        model.blocks[writing].forward = lambda hidden_states, *args: hidden_states.add_(0.1)
        refused = pytest.raises(
            ConfigError,
            match=r"^transformer.*block \d took",
        )
        with dit_accel.attach(model, cache), refused:
            denoised(model)


@pytest.mark.parametrize("name", CACHES)
def test_what_is_kept_shares_no_memory_with_what_passes_through(name):
    """Latents, outputs and the streams between blocks: a model or its caller may write into any of them later."""
    model, passed = six_blocks(), []
    for module in (model, *model.blocks):
        module.register_forward_hook(lambda _, args, given: passed.append((args, given)))
    with dit_accel.attach(model, CACHES[name]) as attachment:
        passed.extend(denoised(model, rows=(1,) * 4))
        kept = []
        for handler in attachment.engine.handlers:
            kept += [decider._kept() for decider in handler._deciders.values()]
            kept += [[point.values for point in history.points] for history in handler._histories.values()]
    memory = [
        {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(what) if isinstance(leaf, Tensor)}
        for what in (kept, passed)
    ]
    assert memory[0]
    assert not memory[0] & memory[1]


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, as collectives give one for what they will have gathered."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = torch.utils._pytree.tree_map_only(Wrapper, lambda one: one.inner, (args, kwargs or {}))
        return func(*args, **kwargs)


def test_what_does_not_tell_its_memory_is_copied_and_recognised_by_its_values():
    inner, plain = torch.arange(3.0), torch.zeros(3)
    kept = own_copies({"wrapped": Wrapper(inner), "plain": plain}, [torch.ones(3)])
    inner.add_(5)
    assert kept["wrapped"].tolist() == [0, 1, 2]
    assert kept["plain"] is plain
    assert own_copies(plain, [Wrapper(plain)]) is not plain  # it may be what is wrapped
    held = RememberedTensors((Wrapper(inner),))
    assert not held.is_unchanged_memory((Wrapper(inner),))
    assert held.has_values((Wrapper(inner),))
    assert not held.has_values((torch.zeros(3),))
