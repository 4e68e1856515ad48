"""The time of a run's forwards, the speed-up that it measures, and why it was not faster."""

import accelerate
import diffusers
import pytest
import torch
from wan_tiny import denoise, tiny_transformer

import dit_accel
from dit_accel import PAG, EasyCache, FirstBlockCache, RadialAttention, SolAttention, StaticCache
from dit_accel.report.clock import TimedForward, Timing
from dit_accel.report.report import Report, StepReport
from dit_accel.report.why import Ran, why_not_faster

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
    assert Timing().lines() == []


def test_training_is_not_timed():
    transformer = tiny_transformer().train()
    with dit_accel.attach(transformer, RADIAL, backend="torch") as attachment:
        transformer(torch.randn(1, 12, 5, 8, 8), torch.tensor([9.0]), torch.randn(1, 6, 64))
        assert attachment.report().timing.forwards == ()


def timing(drawn, seconds=None, before=0.0, call=None, compiled="", first=0.0, **parts):
    """Forwards of a run, a letter each; a dense one takes 1 s, a reduced one .5 s, a skipped one .01 s.

    ``parts`` are the seconds of what each forward holds, by the letter; ``compiled`` are the places of those in which
    torch compiled, and ``first`` is added to the seconds of the first.
    """
    kind = {"d": "dense", "r": "reduced", "s": "skipped", "e": "extended"}
    each = {"d": 1.0, "r": 0.5, "s": 0.01, "e": 2.0, **(seconds or {})}
    return Timing(
        tuple(
            TimedForward(
                transformer="transformer", step_index=step, branch="cond", kind=kind[sign],
                seconds=each[sign] + (0.0 if step else first), before=before if step else 0.0,
                compiled=str(step) in compiled, **{part: found[sign] for part, found in parts.items() if sign in found},
            )
            for step, sign in enumerate(drawn)
        ),
        call,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("measured", "speedup", "words"),
    [
        (timing("ddss"), 4 / 2.02, "1.98 of the denoising loop (p)"),
        (timing("ddss", before=0.1), 4.3 / 2.32, "1.85 of the denoising loop (p)"),
        (timing("ddss", call=6.02), 8 / 6.02, "1.33 of the whole call, 1.98 of the denoising loop (p)"),
        (timing("dddd", first=0.3, call=6.0), 1.0, "1.00 (p), since every forward was dense"),
        (timing("rrss"), None, "unknown, since no forward was dense (p)"),
        # compilation counts in neither; where it is most of the time, or in every dense forward, nothing is measured
        (timing("dddsss", first=1.5, call=6.53), 8 / 5.03, "1.59 of the whole call, 1.98 of the denoising loop (p)"),
        (timing("dddsss", first=41.0), None, "not measured: forwards started for 41 s; run once more (p)"),
        (timing("ddss", {"d": 21.0}, compiled="01"), None, "not measured: forwards compiled for 42 s; run once more"),
        (timing("dr", {"r": 3.0}, compiled="1"), None, "not measured: forwards compiled for 3 s; run once more"),
    ],
)
def test_the_speedup_is_that_of_the_whole_call(measured, speedup, words):
    assert measured.speedup == (None if speedup is None else pytest.approx(speedup))
    assert measured.lines(" (p)")[0].startswith(f"measured speed-up: {words}")


def test_a_forward_in_which_torch_compiles_says_so():
    transformer = tiny_transformer()
    transformer.compile_repeated_blocks(backend="eager")
    with dit_accel.attach(transformer, RADIAL, backend="torch") as attachment:
        for _ in range(2):
            denoise(transformer, 3)
            found = [one.compiled for one in attachment.report().timing.forwards]
            assert found[0] == (not _)


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


def why(drawn, methods, *, log=None, dense_layers=None, stayed=None, notes=(), **options):
    logs = {} if log is None else {"easycache": log}
    return why_not_faster(
        Ran(
            timing=timing(drawn, **options), methods=methods, logs=logs, dense_layers=dense_layers or {},
            stayed=stayed or {}, notes=tuple(notes),
        )
    )  # fmt: skip


def test_ten_situations():
    # 1 and 2: the first and last steps of a cache
    lines = why("ddsssd", CACHE, log=logged("ddsssd", ["first steps", "first steps", "last steps"]))
    assert lines[0].startswith("66% first steps")
    assert "easycache.warmup_steps = 2" in lines[0]
    assert lines[1].startswith("33% last steps")
    # 3: a cache that never skipped, with the value that would skip half of what it measured
    lines = why("dddd", CACHE, log=logged("dddd", ["measured"] * 4))
    assert lines == [
        "100% easycache never skipped: every step that it measured changed more than its threshold; raise "
        "easycache.threshold = 0.05; 0.35 would skip half of them, at a loss of quality"
    ]
    # 4: a distilled model's few steps
    (line,) = why("dddd", CACHE, log=logged("dddd", ["few steps"] * 4))
    assert "easycache.min_steps = 9" in line
    # 5: the dense steps of a sparse method
    lines = why("drrd", {"sol": {"dense_steps": 0.2, "dense_last_steps": 1}})
    assert lines == [
        "33% steps that sol leaves dense; lower sol.dense_steps = 0.2",
        "33% steps that sol leaves dense; lower sol.dense_last_steps = 1",
    ]
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
    assert any("thinned-out attention" in line for line in lines)
    # 9: the first forward compiles
    lines = why("d" * 9, CACHE, log=logged("d" * 9, ["first steps"] * 9))
    slow = Timing((TimedForward(**{**fields(timing("d").forwards[0]), "seconds": 11.0}), *timing("d" * 9).forwards[1:]))
    lines = why_not_faster(Ran(timing=slow, methods=CACHE, logs={"easycache": logged("d" * 9, ["first steps"] * 9)}))
    assert lines[0].startswith("53% the first forward's own start")
    # 10: time between the forwards
    lines = why("dddd", CACHE, log=logged("dddd", ["first steps"] * 4), before=4.0)
    assert lines[0].startswith("75% between the forwards")
    assert "offloading" in lines[0]


def test_what_a_thinned_out_forward_takes_its_time_for():
    parts = dict(attention={"d": 0.6, "r": 0.2}, lists={"r": 0.05}, text={"r": 0.05})
    lines = why("drrr", SPARSE, **parts)  # 2.5 s: a dense forward, and three of half a second
    assert lines == [
        "40% steps that sol leaves dense; lower sol.dense_steps = 0.2",
        "30% what is not self-attention (projections, feed-forward, cross-attention to the text): that is 40% of a "
        "dense forward here; a step cache skips it too; with sparse attention alone 2.50 is the most there is to gain",
        "6% planning attention calls, tile lists included; lists by place are kept for one size: generate more of that",
        "6% attention calls over a part of the keys (the text alone, image prompts), which stay dense; no option "
        "changes this; a step cache skips them",
    ]
    # of the .15 s of attention a third is that of a layer that stays dense, a third of calls with a mask
    key = ("transformer", 1, "cond")
    options = dict(dense_layers={key: 2 / 3}, seconds={"r": 0.9})
    lines = why("dr", SPARSE, stayed={key: {"mask": 1 / 3}}, attention={"d": 0.6, "r": 0.6}, **options)
    assert (
        "11% attention calls that stayed dense in forwards that were thinned out; lower sol.dense_layers = 1" in lines
    )
    assert any(line.startswith("11% attention calls that stayed dense for a mask") for line in lines)
    lines = why("dr", SPARSE, attention={"d": 0.6, "r": 0.55}, seconds={"r": 0.95})
    assert any(line.startswith("28% thinned-out attention") and "step cache" in line for line in lines)


def test_calls_that_stayed_dense_and_why():
    for why_dense, what, advice in (
        ("mask", "not key padding", "one at a time"), ("backend", "on this processor", "name a backend")
    ):  # fmt: skip
        (line,) = why("dd", SPARSE, stayed={("transformer", step, "cond"): {why_dense: 1.0} for step in range(2)})
        assert line.startswith("100% ")
        assert what in line
        assert advice in line
    lines = why("dd", {"sol": {"dense_above_sigma": 0.9}})
    assert lines == ["100% steps that sol leaves dense; lower sol.dense_above_sigma = 0.9"]


def test_waits_for_offloaded_weights_are_a_share_of_every_forward():
    lines = why("dsd", CACHE, log=logged("dsd", ["first steps"] * 2), fetching={"d": 0.5})
    assert lines[0].startswith("50% ")
    assert "waiting for offloaded weights; keep the transformer on the device" in " ".join(lines)
    assert any(line.startswith("50% first steps") for line in lines)


def test_what_guidance_adds_and_what_a_cache_computes_of_skipped_steps():
    lines = why("dee", {"pag": {}})
    assert lines[0].startswith("60% forwards in which no method acted")
    assert lines[1].startswith("40% further forwards that guidance adds")
    blocks = [{**entry, "reused": entry["step_index"] == 1} for entry in logged("dr", ["first steps", "first steps"])]
    lines = why("dr", CACHE, log=blocks)
    assert lines[1].startswith("33% what easycache computes of the steps that it skips")


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("2 skipped in a row", "raise easycache.max_consecutive = 2"),
        ("listed", "list fewer in easycache.compute_at"),
        ("threshold 0", "easycache skips nothing; raise easycache.threshold"),
        ("pag needs it", "steps that pag needs computed"),
        ("conditional", "set easycache.branches to all"),
        ("nothing stored", "forwards that easycache computed: nothing stored"),
    ],
)
def test_each_reason_of_a_cache_has_its_advice(reason, expected):
    (line,) = why("dd", {"easycache": {"max_consecutive": 2}}, log=logged("dd", [reason] * 2))
    assert expected in line


def test_a_bounded_error_is_named_as_what_computed_a_step():
    (line,) = why("dd", {"easycache": {"error": 0.1}}, log=logged("dd", ["measured"] * 2))
    assert line.startswith("100% steps whose forecast easycache expected to be off by more than its error; raise ")
    assert "easycache.error = 0.1; 0.25 would skip half of them" in line


def test_parts_are_timed_in_forwards_one_two_four_and_so_on():
    report = run(RADIAL)
    forwards = report.timing.forwards
    assert [place for place, one in enumerate(forwards) if one.attention is not None] == [1, 2, 4, 8, 16]
    assert all(0 < one.attention < one.seconds for one in forwards if one.attention is not None)
    assert all((one.lists > 0) == (one.kind == "reduced") for one in forwards)
    assert 0 < report.timing.share("attention", "dense") < 1
    assert any("what is not self-attention" in line for line in report.why_not_faster())
    assert all(one.fetching is None for one in forwards)


@pytest.mark.parametrize("how", ["sequential", "group"])
def test_fetches_of_offloaded_weights_are_timed(how):
    transformer = tiny_transformer()
    if how == "sequential":
        accelerate.cpu_offload(transformer, torch.device("cpu"))
    else:
        cpu = torch.device("cpu")
        transformer.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)
    with dit_accel.attach(transformer, RADIAL, backend="torch") as attachment:
        denoise(transformer, 4)
        timed = [one for one in attachment.report().timing.forwards if one.fetching is not None]
    assert len(timed) == 3
    assert all(0 < one.fetching < one.seconds for one in timed)
    hooks = [module._hf_hook for module in transformer.modules() if hasattr(module, "_hf_hook")]
    assert not any("pre_forward" in vars(hook) for hook in hooks)


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
    first, *others = str(report).split("\nin detail:\n")[0].splitlines()
    assert first.startswith("measured speed-up: ")
    assert others[0].startswith("why not faster: ")
    assert any("easycache.threshold = 1e-09" in line for line in others)
    data = report.to_dict()
    assert data["timing"]["forwards"][0]["kind"] == "reduced"
    assert data["why_not_faster"] == report.why_not_faster()


@pytest.mark.parametrize("how", ["attached", "enabled"])
def test_no_further_cache_is_advised_beside_one_of_diffusers(how):
    transformer, config = tiny_transformer(), diffusers.FirstBlockCacheConfig(threshold=0.4)
    if how == "enabled":
        transformer.enable_cache(config)
    methods = [config] if how == "attached" else [SolAttention(block_size=16, min_tokens=1000)]
    with dit_accel.attach(transformer, *methods, backend="torch") as attachment:
        denoise(transformer, 12)
        report = attachment.report()
    assert {"dense", "reduced"} == {one.kind for one in report.timing.forwards}
    lines = " ".join(report.why_not_faster())
    assert "step cache" not in lines
    assert "no method acted" not in lines or how == "enabled"
    assert "diffusers' FirstBlockCacheConfig computed; loosen its options" in lines or how == "enabled"


def test_a_defect_is_the_advice_where_there_is_one():
    transformer = tiny_transformer()
    attachment = dit_accel.attach(transformer, SolAttention(block_size=16), backend="torch")
    for block in transformer.blocks:
        block.attn1.set_processor(type(tiny_transformer().blocks[0].attn1.processor)())
    denoise(transformer, 4)
    line, *others = attachment.report().why_not_faster()
    assert "% forwards in which no method acted; sol: attached, but no attention call of the run was planned" in line
    assert line.endswith("detach and attach again")
    assert "step cache" not in " ".join(others)
    attachment.detach()
