"""The time of a run's forwards, the speed-up that it measures, and why it was not faster."""

import pytest
import torch
from wan_tiny import denoise, tiny_transformer

import dit_accel
from dit_accel import PAG, EasyCache, FirstBlockCache, RadialAttention, SolAttention, StaticCache
from dit_accel.report.clock import TimedForward, Timing
from dit_accel.report.report import Report, StepReport
from dit_accel.report.why import why_not_faster

RADIAL = RadialAttention(block_size=16, decay_factor=0.2, dense_steps=2, dense_layers=0)


def run(*methods, steps=10, **options):
    transformer = tiny_transformer()
    with dit_accel.attach(transformer, *methods, preset="none", backend="torch") as attachment:
        denoise(transformer, steps, **options)
        return attachment.report()


def kinds(report):
    return "".join(one.kind[0] for one in report.timing.forwards if one.branch == "cond")


@pytest.mark.parametrize(
    ("method", "drawn"),
    [
        (StaticCache(every=2, warmup_steps=2, last_steps=0), "ddsdsdsdsd"),
        (RADIAL, "ddrrrrrrrr"),
        (FirstBlockCache(threshold=1e9, warmup_steps=2, last_steps=0), "ddrrrrrrrr"),
        (PAG(layers="L1", scale=1.0), "e" * 10),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_forward_is_of_the_kind_of_what_it_ran(method, drawn):
    report = run(method)
    assert kinds(report) == drawn
    assert all(one.seconds > 0 and one.before >= 0 for one in report.timing.forwards)
    assert report.timing.total <= report.timing.elapsed


def test_training_is_not_timed():
    transformer = tiny_transformer().train()
    with dit_accel.attach(transformer, RADIAL, backend="torch") as attachment:
        transformer(torch.randn(1, 12, 5, 8, 8), torch.tensor([9.0]), torch.randn(1, 6, 64))
        assert attachment.report().timing.forwards == ()


def timing(drawn, seconds=None, before=0.0):
    """Forwards of a run, a letter each; a dense one takes 1 s, a reduced one .5 s, a skipped one .01 s."""
    kind = {"d": "dense", "r": "reduced", "s": "skipped", "e": "extended"}
    each = {"d": 1.0, "r": 0.5, "s": 0.01, "e": 2.0, **(seconds or {})}
    return Timing(
        tuple(
            TimedForward(
                transformer="transformer", step_index=step, branch="cond", kind=kind[sign], seconds=each[sign],
                before=before if step else 0.0,
            )
            for step, sign in enumerate(drawn)
        )
    )  # fmt: skip


def test_the_speedup_is_that_over_dense_forwards_alone():
    measured = timing("ddss")
    assert measured.dense == 1.0
    assert measured.speedup == pytest.approx(4 / 2.02)
    assert measured.lines()[0].startswith("measured speed-up: 1.98 ")
    assert timing("rrss").speedup is None
    assert timing("rrss").lines()[0].startswith("measured speed-up: unknown")
    assert Timing().lines() == []


def logged(drawn, reasons):
    """What a cache logs of the same run: the reasons of what it computed, in turn."""
    given = iter(reasons)
    return [
        dict(
            transformer="transformer", step_index=step, branch="cond", reused=sign == "s",
            reason="measured" if sign == "s" else (found := next(given)), value=0.5 if sign == "s" else
            0.2 + 0.1 * step if found == "measured" else None,
        )
        for step, sign in enumerate(drawn)
    ]  # fmt: skip


CACHE = {"easycache": {"threshold": 0.05, "warmup_steps": 2, "last_steps": 1, "min_steps": 9}}
SPARSE = {"sol": {"dense_steps": 0.2, "dense_layers": 1, "min_tokens": 40_000}}


def why(drawn, methods, *, log=None, dense_layers=None, notes=(), **options):
    logs = {} if log is None else {"easycache": log}
    return why_not_faster(timing(drawn, **options), methods, logs, dense_layers or {}, tuple(notes))


def test_ten_situations():
    # 1 and 2: the first and last steps of a cache
    lines = why("ddsssd", CACHE, log=logged("ddsssd", ["first steps", "first steps", "last steps"]))
    assert lines[0].startswith("66% first steps")
    assert "easycache.warmup_steps = 2" in lines[0]
    assert lines[1].startswith("33% last steps")
    # 3: a cache that never skipped, with the value that would skip half of what it measured
    lines = why("dddd", CACHE, log=logged("dddd", ["measured"] * 4))
    assert lines == [
        "100% steps that changed more than easycache skips; raise easycache.threshold = 0.05; 0.35 would skip half of "
        "them, at a loss of quality"
    ]
    # 4: a distilled model's few steps
    (line,) = why("dddd", CACHE, log=logged("dddd", ["few steps"] * 4))
    assert "easycache.min_steps = 9" in line
    # 5: the dense steps of a sparse method
    lines = why("ddrr", SPARSE)
    assert lines[0].startswith("67% steps that sol leaves dense; lower sol.dense_steps = 0.2")
    # 6: too few tokens
    (line,) = why("dddd", SPARSE, notes=["sol stays dense over 80 visual tokens, min_tokens = 40000"])
    assert line.startswith("100% too few tokens")
    assert "sol.min_tokens" in line
    # 7: layers that stay dense
    shares = {("transformer", step, "cond"): 0.25 for step in range(4)}
    (line,) = why("rrrr", SPARSE, dense_layers=shares)
    assert line.startswith("25% attention calls that stayed dense")
    assert "sol.dense_layers = 1" in line
    # 8: attention is a small part of a forward
    lines = why("dr", SPARSE, seconds={"r": 0.95})
    assert any("small part" in line for line in lines)
    # 9: the first forward compiles
    lines = why("d" * 9, CACHE, log=logged("d" * 9, ["first steps"] * 9))
    slow = Timing((TimedForward(**{**fields(timing("d").forwards[0]), "seconds": 11.0}), *timing("d" * 9).forwards[1:]))
    lines = why_not_faster(slow, CACHE, {"easycache": logged("d" * 9, ["first steps"] * 9)}, {}, ())
    assert lines[0].startswith("53% the first forward's own start")
    # 10: time between the forwards
    lines = why("dddd", CACHE, log=logged("dddd", ["first steps"] * 4), before=4.0)
    assert lines[0].startswith("75% between the forwards")
    assert "offloading" in lines[0]


def fields(one):
    return {name: getattr(one, name) for name in one.__slots__}


def test_nothing_is_said_where_nothing_ran_or_no_method_is_attached():
    assert why("", CACHE) == []
    steps = [StepReport(
        transformer="transformer", step_index=0, branch="cond", dense_layers=3, sparse_layers=0, density=1.0, pooled=0.0
    )]  # fmt: skip
    assert Report(methods={}, backend="torch", model={}, steps=steps, timing=timing("dd")).why_not_faster() == []


def test_a_report_begins_with_whether_it_helped():
    report = run(
        EasyCache(threshold=1e-9, warmup_steps=0.2), SolAttention(block_size=16, dense_steps=0, dense_layers=1)
    )
    first, *others = str(report).splitlines()
    assert first.startswith("measured speed-up: ")
    assert others[0].startswith("why not faster: ")
    assert any("easycache.threshold = 1e-09" in line for line in others)
    data = report.to_dict()
    assert data["timing"]["forwards"][0]["kind"] == "reduced"
    assert data["why_not_faster"] == report.why_not_faster()
