"""The engine of step caches, on made-up forwards: which are computed, and whose state is read."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cache_calls import Driven, line, run_through, still

from dit_accel import ConfigError, EasyCache, StaticCache
from dit_accel.adapters.guidance import Guidance
from dit_accel.attachment.layers import RememberedTensors
from dit_accel.methods.caches.cache_config import is_unconditional
from dit_accel.methods.caches.engine import StepDecision
from dit_accel.methods.caches.history import own_copies
from dit_accel.methods.caches.log import CachedForward, section_of
from dit_accel.methods.caches.ranks import agreed, process_groups

EVERY = dict(warmup_steps=0, last_steps=0)
ONE = torch.ones(1, 2, 3)


def places(drawn: str) -> tuple[int, ...]:
    """The steps that are skipped in a drawing of a run."""
    return tuple(place for place, sign in enumerate(drawn) if sign == ".")


def rising(step: int) -> torch.Tensor:
    """Latents that grow by 1 a step."""
    return torch.full((1, 2, 3), float(step))


def cache(**options):
    return StaticCache(**{"every": 100, **EVERY, **options})


THIRDS = StaticCache(compute_at=(0.0, 1 / 3, 1.0))


def test_guards():
    for options, drawn, measured in (
        (dict(min_steps=10), "#.........", "##........"),
        (dict(warmup_steps=0.25), "###.......", "###......."),
        (dict(last_steps=2), "#.......##", "##......##"),
        (dict(max_consecutive=2), "#..#..#..#", "##..#..#.."),
        (dict(max_consecutive=0.15), "#..#..#..#", "##..#..#.."),
        (dict(max_consecutive=3, growing=True, last_steps=1), "#.#.#..#.#", "##.#..#..#"),
        (dict(warmup_steps=4, max_consecutive=3, growing=True, last_steps=1), "####.#..##", "####.#..##"),
        (dict(warmup_steps=2, max_consecutive=3, last_steps=1), "##...#...#", "##...#...#"),
        (dict(min_steps=11), "##########", "##########"),
    ):
        driven = Driven(cache(**options), line)
        run_through(driven, still)
        assert driven.drawn() == drawn
        assert driven.handler.settings.skipped_steps(10) == places(drawn)
        forever = Driven(EasyCache(threshold=1e9, **{**EVERY, **options}), line)
        run_through(forever, rising)
        assert forever.drawn() == measured  # a rate takes two computed steps


def test_lists_decide_which_steps_are_computed():
    for config, drawn in (
        (StaticCache(), "##.#.#.#.##"),
        (StaticCache(every=5, **EVERY), "#....#....#"),
        (StaticCache(every=5, warmup_steps=3, last_steps=0), "###....#..."),
        (StaticCache(steps=(1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1)), "#..#......#"),
        (StaticCache(compute_at=(0.0, 0.3, 1.0)), "#..#......#"),
        (StaticCache(compute_at=(0.4,), every=5), "##..#.#...#"),  # with the usual first and last steps
        (cache(compute_at=(1 / 3, 1.0)), "#..#......#"),
        (THIRDS, "#........#.................#"),
        (THIRDS, "#"),
    ):
        driven, steps = Driven(config, line), len(drawn)
        run_through(driven, still, steps=steps)
        assert driven.drawn(steps=steps) == drawn
        assert driven.handler.settings.skipped_steps(steps) == places(drawn)
    assert THIRDS.always_computed(0, 28) == "listed"


def test_steps_below_a_noise_level_are_skipped_and_no_others():
    driven = Driven(StaticCache(below_sigma=0.03, stored="output"), line)
    for noise, levels in (("flow", (1.0, 0.86, 0.6, 0.0089)), ("exploding", (80.0, 0.2, 0.02, 0.01))):
        driven.handler.begin_run()
        driven.ran.clear()
        for step, sigma in enumerate(levels):
            driven.forward(step, still(step), steps=4, sigma=sigma, noise=noise)
        assert driven.drawn(steps=4) == ("###." if noise == "flow" else "##..")
    with pytest.raises(ConfigError, match=r"staticcache\.every = 2 .*below_sigma = 0\.03"):
        StaticCache(every=2, below_sigma=0.03)
    assert not driven.handler.estimate(None, 4).skipped


def test_the_first_branch_of_a_step_decides_for_all():
    def output(step, branch):
        grows = 1.0 if branch == "cond" else float("inf")
        return (torch.full((1, 2, 3), 1 + 0.001 * grows * step),)

    driven = Driven(EasyCache(threshold=0.05, warmup_steps=2, last_steps=1), output)
    run_through(driven, rising, branches=("cond", "uncond"))
    assert driven.drawn() == driven.drawn("uncond") == "##.......#"
    values = [entry["value"] for entry in driven.handler.report().data["forwards"] if entry["branch"] == "uncond"]
    assert values == [None] * 10
    none = Driven(EasyCache(threshold=0.0, **EVERY), line)
    run_through(none, rising)
    assert {entry["reason"] for entry in none.handler.report().data["forwards"]} == {"nothing stored", "threshold 0"}


def test_only_the_unconditional_branch_is_skipped():
    driven = Driven(cache(branches="uncond", warmup_steps=2, last_steps=1), line)
    run_through(driven, still, branches=("cond", "uncond"))
    assert (driven.drawn(), driven.drawn("uncond")) == ("##########", "##.......#")
    saving = driven.handler.estimate(None, 10)
    assert (saving.forwards, saving.skipped) == (7, frozenset())
    assert all(is_unconditional(branch, "x") for branch in ("uncond", "cond/uncond", "pred_uncond"))
    assert not any(is_unconditional(branch, "x") for branch in ("cond", "pred_cond", "uncond/perturbed"))
    for branch, why in (("call 1", "cache_context"), ("cond_uncond", "both in one")):
        with pytest.raises(ConfigError, match=rf"^staticcache\.branches = 'uncond'.*{why}"):
            Driven(cache(branches="uncond"), line).forward(0, still(0), branch)


def test_a_branch_that_comes_or_goes_midway():
    """Where the first branch of the steps ends, the other one's outputs are not compared with that one's."""
    going, late = Driven(cache(warmup_steps=2), line), Driven(cache(), line)
    measured, counted = Driven(EasyCache(threshold=1e9, **EVERY), line), Driven(cache(max_consecutive=4), line)
    for step in range(9):
        for branch in ("cond",) if step in (2, 3) else ("cond", "uncond"):
            going.forward(step, still(step), branch)
        for branch in ("cond",) if step < 2 else ("cond", "uncond"):
            late.forward(step, still(step), branch)
        for branch in ("uncond", "cond") if step < 4 else ("cond",):
            measured.forward(step, rising(step), branch)
            counted.forward(step, still(step), branch)
    assert going.drawn(steps=9) == going.drawn("uncond", 9) == "##......."
    assert (late.drawn(steps=9), late.drawn("uncond", 9)) == ("#........", "..#......")  # nothing was stored before
    assert late.handler.report().data["forwards"][3]["reason"] == "nothing stored"
    assert measured.drawn(steps=9) == "##..##..."  # a rate takes two computed steps of one branch
    assert counted.drawn(steps=9) == "#....#..."  # it goes on counting what was skipped in a row


def test_another_expert_drops_what_was_stored():
    driven = Driven(cache(predictor="taylor", warmup_steps=2, warmup_of="each"), line)
    driven.install("transformer", "transformer_2")
    for step in range(6):
        driven.forward(step, still(step), steps=None, transformer="transformer" if step < 3 else "transformer_2")
    assert driven.drawn(steps=6) == "##.##."
    assert driven.handler.state_bytes() == 2 * 24


def test_transformers_that_hold_a_branch_each_are_cached_beside_each_other():
    """They take turns in every step, and none takes over from the other."""
    holds = Guidance(branch_of={"transformer": "cond", "unconditional_transformer": "uncond"})
    driven = Driven(cache(predictor="taylor", warmup_steps=2), line, guidance=holds)
    for step in range(6):
        for name, branch in holds.branch_of.items():
            out = driven.forward(step, still(step), branch, transformer=name)[0]
            assert torch.equal(out, line(step, branch)[0])
    assert driven.drawn(steps=6) == driven.drawn("uncond", 6) == "##...."
    assert {key[0] for key in driven.handler._histories} == {*holds.branch_of}


@pytest.mark.parametrize(
    ("options", "drawn"),
    [
        (dict(warmup_steps=2), "##...|#...."),
        (dict(warmup_steps=2, warmup_of="each"), "##...|##..."),
        (dict(warmup_steps=0.4, warmup_of="each"), "##...|##..."),
        (dict(warmup_steps=0.6, warmup_of="last", last_steps=1), "#####|###.#"),
    ],
)
def test_what_the_first_steps_are_the_first_of(options, drawn):
    steps = len(drawn) - 1
    driven = Driven(EasyCache(threshold=1e9, **{**EVERY, **options}), line)
    driven.handler.first_expert = lambda: 0.52
    driven.install("transformer", "transformer_2")
    for run in range(2):
        driven.ran.clear(), driven.handler.reset(), driven.handler.begin_run()
        for step in range(steps):
            name = "transformer" if step < drawn.index("|") else "transformer_2"
            driven.forward(step, rising(step), steps=steps, transformer=name)
        measured = drawn.replace("|#.", "|##")  # a rate takes two computed steps
        assert driven.drawn(steps=steps) == measured.replace("|", ""), run
    assert cache(**options).skipped_steps(steps, switch=drawn.index("|")) == places(drawn.replace("|", ""))


def test_a_share_of_an_expert():
    config = cache(warmup_steps=0.5, warmup_of="each")
    assert [config.always_computed(index, 10) for index in (4, 5)] == ["first steps", None]  # alone, it makes all steps
    driven = Driven(cache(warmup_steps=0.4, warmup_of="each"), line)
    driven.install("transformer", "transformer_2")
    with pytest.raises(ConfigError, match=r"^staticcache\.warmup_of = 'each'.*warmup_steps = 0\.4"):
        driven.forward(0, still(0))


def test_two_calls_a_step_follow_one_decision():
    driven = Driven(cache(warmup_steps=2, predictor="taylor"), line)
    for step in range(4):
        for _ in range(2):
            assert float(driven.forward(step, still(step))[0].mean()) == step
    assert driven.ran == [(0, "cond")] * 2 + [(1, "cond")] * 2


def test_another_shape_or_type_is_computed_afresh():
    driven = Driven(cache(predictor="taylor"), lambda step, branch: (ONE,))
    for step, latents in enumerate((still(0), still(0), torch.zeros(1, 2, 4), torch.zeros(1, 2, 4).double())):
        driven.forward(step, latents)
    assert driven.drawn(steps=4) == "#.##"


def test_gradients_and_training_are_computed():
    driven, leaf = Driven(cache(), line), still(2).requires_grad_()
    driven.forward(0, still(0))
    driven.forward(1, still(1), training=True)
    driven.forward(2, leaf)
    with torch.no_grad():
        driven.forward(3, leaf)
    assert driven.drawn(steps=4) == "###."
    weight = torch.ones(1, requires_grad=True)
    learning = Driven(cache(), lambda step, branch: (weight * ONE,))
    run_through(learning, still, 3)
    assert learning.drawn(steps=3) == "###"


def test_memory_is_counted_and_freed():
    for options, tensors, passed in (
        (dict(), 1, 1), (dict(predictor="taylor", order=2), 3, 3), (dict(predictor="heun"), 3, 2),
        (dict(predictor="chebyshev"), 4, 2),
    ):  # fmt: skip
        driven = Driven(cache(warmup_steps=6, **options), line)
        run_through(driven, still, branches=("cond", "uncond"))
        assert driven.handler.state_bytes() == tensors * 2 * 24, options
        assert driven.handler.settings.passed_points == passed
        driven.handler.reset()
        assert not driven.handler._histories


def test_a_run_of_unknown_or_other_length():
    for steps, why in ((4, "3 entries.*4 steps"), (None, "3 entries.*unknown")):
        with pytest.raises(ConfigError, match=rf"^staticcache\.steps.*{why}"):
            Driven(StaticCache(steps=(1, 0, 1)), line).forward(0, still(0), steps=steps)
    shares = dict(last_steps=1, warmup_steps=0.5, max_consecutive=0.5, growing=True, reach=0.5, compute_at=(0.5,))
    for option, value in shares.items():
        driven = Driven(cache(**{"max_consecutive": 2, option: value}), line)
        with pytest.raises(ConfigError, match=rf"^staticcache\.{option} = .*steps"):
            [driven.forward(step, still(step), steps=None) for step in range(2)]
    whole = Driven(cache(max_consecutive=1, reach=1), line)
    [whole.forward(step, still(step), steps=None) for step in range(4)]
    assert whole.drawn(steps=4) == "#.#."
    assert cache(reach=0.29).reached(100) == 29  # of the decimal that was written: .29 x 100 lies below


def test_the_section_counts_what_was_computed():
    place = dict(transformer="transformer", branch="cond", reason="")
    entries = [
        CachedForward(**place, step_index=step, reused=step > 1, value=value)
        for step, value in enumerate((None, 0.3, 0.1, float("nan")))
    ]
    for threshold in (None, 0.25):
        section = section_of("made-up", entries, threshold)
        assert (section.data["computed"], section.data["reused"]) == (2, 2)
        assert section.title == "made-up: 2 of 4 forwards reused (# computed, . reused)"
        assert section.lines[-1] == "indicator 0.1 to 0.3" + (", threshold 0.25" if threshold else "")
    assert section_of("made-up", entries[:1], 0.25).lines == ("transformer, cond: #",)
    assert section_of("made-up", entries[-1:], None).lines[-1] == "indicator not a number"


@dataclass
class Moved(StepDecision):
    """What a stranger's cache measures against."""

    inputs: dict[str, Any] | None = None


def test_what_a_cache_of_a_stranger_keeps_is_copied_for_it():
    """In whatever form it keeps what it was given, and in fields that it never declared."""
    x, decision = torch.zeros(1, 2, 3), Moved(branch="cond")
    assert (decision.step, decision.reuse, decision.in_a_row) == (-1, False, 0)
    decision.inputs, decision.outputs = {"hidden_states": x}, [x.view(-1)]
    decision.copy_shared({"hidden_states": x})
    x.add_(1)
    assert not decision.inputs["hidden_states"].any()
    assert not decision.outputs[0].any()
    assert decision.nbytes == 2 * 24


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, as collectives give one for what they will have gathered."""

    @staticmethod
    def __new__(cls, inner):
        wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = torch.utils._pytree.tree_map_only(Wrapper, lambda wrapper: wrapper.inner, (args, kwargs or {}))
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


def test_numbers_are_summed_over_every_group_and_none_spreads(monkeypatch):
    """As if each group had another process with the same numbers, as `torch.distributed` sums them."""
    groups = []
    monkeypatch.setattr(dist, "all_reduce", lambda sums, group: (groups.append(group), sums.mul_(2)))
    values = [torch.tensor(1.5), torch.tensor(3), torch.tensor(float("nan"))]
    one, other, none = agreed(values, ["ring", "ulysses"])
    assert (one, other, groups) == (6.0, 12.0, ["ring", "ulysses"])
    assert none != none
    assert agreed(values[:2], []) == [1.5, 3.0]


def test_groups_are_those_of_context_parallelism_and_of_the_weights(monkeypatch):
    mesh = lambda *groups: SimpleNamespace(ndim=len(groups), get_group=groups.__getitem__)  # noqa: E731
    ring = SimpleNamespace(context_parallel_config=SimpleNamespace(_flattened_mesh=mesh([0, 1])))
    weights = [SimpleNamespace(device_mesh=mesh([0, 1], [0, 2])), torch.ones(1)]
    model = SimpleNamespace(_parallel_config=ring, parameters=lambda: weights)
    monkeypatch.setattr(dist, "get_process_group_ranks", list)
    for running, groups in ((True, [[0, 1], [0, 2]]), (False, [])):
        monkeypatch.setattr(dist, "is_initialized", lambda running=running: running)
        assert process_groups(model) == groups
