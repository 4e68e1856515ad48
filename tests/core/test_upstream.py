"""The tools beside the tests: diffusers' own tests with methods attached, and the defects of `make mutants`."""

import ast
import contextlib
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from wan_tiny import TINY

from dit_accel import LiteAttention, attach

UPSTREAM = Path(__file__).parents[1] / "upstream"
sys.path[:0] = [str(UPSTREAM), str(UPSTREAM.with_name("mutants"))]

import upstream_models  # noqa: E402
from mutations import mutated, mutations_of  # noqa: E402
from upstream_judge import Expected, problems, read_expected  # noqa: E402
from upstream_models import Watch, leftovers, same_bits, untouched  # noqa: E402

DROPS = LiteAttention(threshold=1e9, allow_positive_threshold=True, dense_steps=0, block_size=16)


def toy_class():
    """Return a class of its own that the Wan adapter covers, since following one changes it for good."""
    return type("WanTransformer3DModel", (diffusers.WanTransformer3DModel,), {})


def inputs(timestep):
    noise = torch.Generator().manual_seed(1)
    latents, text = torch.randn(1, 12, 7, 8, 16, generator=noise), torch.randn(1, 6, 64, generator=noise)
    return latents, torch.tensor([timestep]), text


@torch.no_grad()
def forward(model, timestep=500.0):
    return model(*inputs(timestep))


def watched(mode):
    """Watch a new class; return the watch, the class and a model of it."""
    watch, cls = Watch(mode), toy_class()
    watch.follow(cls)
    watch.begin(compiles=False)
    return watch, cls, cls(**TINY)


def ones(*shape):
    return lambda: torch.ones(*(shape or (3,)))


def fails():
    raise ValueError("no")


def test_what_is_left_after_detach_is_found():
    model, other = toy_class()(**TINY), toy_class()(**TINY)
    attach(other, preset="none")
    with attach(model, preset="none"):
        call = vars(model)["_compiled_call_impl"]
        places = leftovers(model)
    top = "WanTransformer3DModel"
    ours = {f"{top}._compiled_call_impl", f"{top}.compile", f"{top}.cache_context", "blocks.0.attn1.processor"}
    assert ours <= {*places}
    assert leftovers(model) == []
    block, processor = model.blocks[0], other.blocks[0].attn1.processor
    for plant, place in (
        (lambda: setattr(model.blocks[1].attn2, "processor", processor), "blocks.1.attn2.processor"),
        (lambda: block.register_forward_hook(call), "blocks.0._forward_hooks"),
        (lambda: setattr(model.blocks[1], "_dit_accel_layer", 1), "blocks.1._dit_accel_layer"),
        (lambda: setattr(block.attn2.processor, "_dit_accel_layer", 1), "blocks.0.attn2.processor"),
    ):
        plant()
        assert place in leftovers(model)


def test_what_is_left_or_changed_and_a_detach_that_raises_are_reported(monkeypatch):
    watch, _, model = watched("neutral")
    model.blocks[0].extra = vars(model)["_compiled_call_impl"]
    assert watch.end() == ["neutral: WanTransformer3DModel: blocks.0.extra is left after detach"]
    assert watch.end() == []  # of the next test nothing
    watch, _, model = watched("neutral")
    vars(model)["_compiled_call_impl"].owner.detach()
    assert "detach raised AttachError" in watch.end()[0]

    def leaves_something(model, *methods, preset):
        model.blocks[0].attn1.processor.kept = 1
        return attach(model, *methods, preset="none")

    monkeypatch.setattr(upstream_models, "attach", leaves_something)
    watch, _, _ = watched("neutral")
    assert watch.end() == ["neutral: WanTransformer3DModel: attach and detach changed blocks.0.attn1.processor.kept"]


def test_forwards_are_compared_with_plain_ones():
    for mode, attached, problem in (
        ("neutral", ones(), None),
        ("neutral", lambda: torch.ones(3).nextafter(torch.full((3,), 2.0)), "in its bits"),
        ("neutral", ones(4), "other shapes"),
        ("neutral", lambda: [torch.ones(3)] * 2, "other shapes"),
        ("keep-all", lambda: torch.full((3,), 1.000001), None),
        ("keep-all", lambda: torch.full((3,), 1.0001), "by 0.0001 of its size"),
        ("keep-all", lambda: torch.full((3,), float("nan")), "by nan of its size"),
        ("active", lambda: torch.zeros(3), None),
    ):
        watch, _, model = watched(mode)
        watch.run(model, attached, ones())
        errors = watch.end()
        assert (errors == []) if problem is None else (problem in errors[0])


def test_a_forward_raises_attached_where_it_does_plain():
    for attached, plain, said in (
        (fails, fails, []),
        (fails, ones(), ["the attached forward alone raised"]),
        (ones(), fails, ["the plain forward alone raised"]),
    ):
        watch, _, model = watched("neutral")
        with pytest.raises(ValueError, match="no") if attached is fails else contextlib.nullcontext():
            watch.run(model, attached, plain)
        assert [text in error for text, error in zip(said, watch.end(), strict=True)] == [True] * len(said)


def test_a_plain_forward_runs_nothing_of_ours():
    model = toy_class()(**TINY)
    with attach(model, DROPS):
        forward(model)
        thinned = forward(model, 400.0).sample
        held = model.blocks[0].attn1.processor
        with untouched(model):
            assert not any("processor" in place for place in leftovers(model))
            plain = model._call_impl(*inputs(400.0)).sample
        assert model.blocks[0].attn1.processor is held
    assert same_bits(plain, forward(model, 400.0).sample)
    assert not torch.allclose(plain, thinned)


def test_keep_all_must_keep_all(monkeypatch):
    monkeypatch.setitem(upstream_models.METHODS, "keep-all", (DROPS,))
    watch, _, model = watched("keep-all")
    for timestep in (500.0, 400.0):
        forward(model, timestep)
    errors = " ".join(watch.end())
    assert all(text in errors for text in ("dropped tiles", "of its size"))


def ended(compared=1, **tests):
    """What a run writes down of tests that ended so."""
    return {"tests": {test: (end, "why") for test, end in tests.items()}, "counts": {"compared": compared}}


PLAIN = ended(a="passed", b="failed")


def test_differences_that_are_not_listed_and_listed_ones_that_vanished_are_problems():
    for attached, expected, problem in (
        (PLAIN, (), None),
        (ended(a="failed", b="failed"), (), "a: passed plain, failed attached: why"),
        (ended(a="passed", b="passed"), (), "b: failed plain, passed attached: why"),
        (ended(a="failed", b="failed"), ("neutral", "a", "failed"), None),
        (ended(a="failed", b="failed"), ("active", "a", "failed"), "a: passed plain, failed attached"),
        (PLAIN, ("neutral", "a", "failed"), "ends as it does plain (passed); take it out"),
        (PLAIN, ("neutral", "a", "passed"), "ends as it does plain (passed); take it out"),
        (ended(a="error", b="failed"), ("neutral", "a", "failed"), "listed as failed, error attached"),
        (PLAIN, ("neutral", "c", "failed"), "c: is listed and there is no such test"),
        (ended(a="passed"), (), "b: it ran in one of the two runs alone"),
        (ended(a="passed", b="failed", compared=0), (), "nothing was compared"),
    ):
        names = ("mode", "test", "outcome")
        listed = [Expected(reason="so", **dict(zip(names, expected, strict=True)))] if expected else []
        reported = problems("neutral", PLAIN, attached, listed, whole=True)
        assert len(reported) == (problem is not None)
        assert all(problem in text for text in reported)
        assert all(entry.reason for entry in read_expected(UPSTREAM / "expected.toml"))
        if expected[1:2] == ("c",):  # of picked tests the list may hold others
            assert problems("neutral", PLAIN, attached, listed, whole=False) == []


TEXT = '''"""A module of 3 lines."""

LIMIT = 4


def height(x: int = 2, names=()) -> int:
    """Return 1 of 2."""
    if x < LIMIT and not names:
        raise ValueError(f"{x + 1} is below {LIMIT}")
    warnings.warn("é", stacklevel=2)
    lines.append("é"); y = any(x == 1 for x in names)
    return max(x,
               3) - 1
'''
FOUND = """
3: 4 -> 5
6: 2 -> 3
8: x < LIMIT and not names -> x < LIMIT or not names
8: x < LIMIT -> x <= LIMIT
8: not names -> names
9: raise ValueError(f"{x + 1} is below {LIMIT}") -> pass
11: lines.append("é") -> pass
11: any(x == 1 for x in names) -> all((x == 1 for x in names))
11: x == 1 -> x != 1
11: 1 -> 2
12: max(x, 3) - 1 -> max(x, 3) + 1
12: max(x, 3) -> min(x, 3)
13: 3 -> 4
13: 1 -> 2
"""


def test_each_defect_is_where_it_says_and_nothing_else_changes():
    found = mutations_of("a.py", TEXT)
    assert [f"{one.line}: {one.before} -> {one.after}" for one in found] == FOUND.strip().splitlines()
    assert {one.where for one in found} == {"", "height"}
    assert len({one.key for one in found}) == len(found)  # the second 1 -> 2 has a number
    for one in found:
        text = mutated(TEXT, one)
        ast.parse(text)
        assert text != TEXT
        after = one.after if one.after == "pass" else f"({one.after})"
        assert " ".join(text.replace(after, one.before, 1).split()) == " ".join(TEXT.split())
    assert mutations_of("a.py", "@triton.jit\ndef kernel(x):\n    return x + 1\n") == []
