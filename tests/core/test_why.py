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
from dit_accel.report.why import RunCauses, why_not_faster

RADIAL = RadialAttention(block_size=16, decay_factor=0.2, dense_steps=2, dense_layers=0)


def run(*methods, steps=10, **options):
    transformer = tiny_transformer()
    with dit_accel.attach(transformer, *methods, preset="none", backend="torch") as attachment:
        denoise(transformer, steps, **options)
        return attachment.report()


def kinds(report):
    return "".join(one.kind[0] for one in report.timing.forwards if one.branch == "cond")


def test_a_forward_is_of_the_kind_of_what_it_ran():
    for method, drawn in (
        (StaticCache(every=2, warmup_steps=2, last_steps=0), "ddsdsdsdsd"),
        (RADIAL, "ddrrrrrrrr"),
        (FirstBlockCache(threshold=1e9, warmup_steps=2, last_steps=0), "ddrrrrrrrr"),
        (PAG(layers="L1", scale=1.0), "e" * 10),
    ):
        report = run(method)
        assert kinds(report) == drawn
        assert all(one.seconds > 0 and one.before >= 0 for one in report.timing.forwards)
        assert report.timing.total <= report.timing.elapsed
        assert Timing().lines() == []


def test_training_is_not_timed_and_what_torch_compiles_says_so():
    transformer = tiny_transformer(num_layers=1)
    transformer.compile_repeated_blocks(backend="eager")
    with dit_accel.attach(transformer, RADIAL, backend="torch") as attachment:
        transformer.train()(torch.randn(1, 12, 5, 8, 8), torch.tensor([9.0]), torch.randn(1, 6, 64))
        assert attachment.report().timing.forwards == ()
        for compiled in (True, False):
            denoise(transformer.eval(), 3)
            assert attachment.report().timing.forwards[0].compiled == compiled


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


def test_the_speedup_is_that_of_the_whole_call():
    for measured, speedup, words in (
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
    ):
        assert measured.speedup == (None if speedup is None else pytest.approx(speedup))
        assert measured.lines(" (p)")[0].startswith(f"measured speed-up: {words}")


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


CACHE = {"easycache": dict(threshold=0.05, warmup_steps=2, last_steps=1, min_steps=9, max_consecutive=2)}
SPARSE = {"sol": {"dense_steps": 0.2, "dense_layers": 1, "min_tokens": 40_000}}


def why(drawn, methods, *, log=None, dense_layers=0.0, stayed=None, notes=(), reused=(), **options):
    """Return the causes of a run; ``log`` are a cache's reasons, or one for all, shares are those of every forward."""
    keys = [("transformer", step, "cond") for step in range(len(drawn))]
    entries = [] if log is None else logged(drawn, [log] * len(drawn) if isinstance(log, str) else log)
    entries = [{**entry, "reused": entry["reused"] or entry["step_index"] in reused} for entry in entries]
    return why_not_faster(
        RunCauses(
            timing=timing(drawn, **options), methods=methods, logs={"easycache": entries} if entries else {},
            dense_layers=dict.fromkeys(keys, dense_layers) if dense_layers else {},
            stayed=dict.fromkeys(keys, stayed) if stayed else {}, notes=tuple(notes),
        )
    )  # fmt: skip


PARTS = dict(attention={"d": 0.6, "r": 0.2}, lists={"r": 0.05}, text={"r": 0.05})
WARMUP, DENSE = "first steps ... lower easycache.warmup_steps = 2", "steps that sol leaves dense ... lower sol.dense"


def test_the_causes_of_a_run_and_what_to_do():
    for drawn, methods, options, expected in (
        ("", CACHE, {}, []),
        ("ddsssd", CACHE, dict(log=["first steps", "first steps", "last steps"]),
         [f"66% {WARMUP}", "33% last steps ... last_steps = 1"]),
        ("dddd", CACHE, dict(log="measured"), ["100% easycache never skipped ... threshold = 0.05; 0.35 would"]),
        ("dd", {"easycache": {"error": 0.1}}, dict(log="measured"), ["100% steps whose ... error = 0.1; 0.25 would"]),
        ("dddd", CACHE, dict(log="few steps"), ["100% a run of few steps ... easycache.min_steps = 9"]),
        ("dd", CACHE, dict(log="2 skipped in a row"), ["100% steps that ... raise easycache.max_consecutive = 2"]),
        ("dd", CACHE, dict(log="listed"), ["100% steps that are listed ... easycache.compute_at"]),
        ("dd", CACHE, dict(log="threshold 0"), ["100% easycache skips nothing ... raise easycache.threshold"]),
        ("dd", CACHE, dict(log="pag needs it"), ["100% steps that pag needs computed ... detach pag"]),
        ("dd", CACHE, dict(log="conditional"), ["100% conditional forwards ... set easycache.branches to all"]),
        ("dd", CACHE, dict(log="nothing stored"), ["100% forwards that easycache computed: nothing stored ... "]),
        ("drrd", {"sol": {"dense_steps": 0.2, "dense_last_steps": 1}}, {},
         [f"33% {DENSE}_steps = 0.2", f"33% {DENSE}_last_steps = 1"]),
        ("dd", {"sol": {"dense_above_sigma": 0.9}}, {}, [f"100% {DENSE}_above_sigma = 0.9"]),
        ("dddd", SPARSE, dict(notes=["sol stays dense over 80 visual tokens, min_tokens = 40000"]),
         ["100% too few tokens ... use a step cache, or lower sol.min_tokens"]),
        ("rrrr", SPARSE, dict(dense_layers=0.25), ["25% attention calls that stayed ... sol.dense_layers = 1"]),
        ("dd", SPARSE, dict(stayed={"mask": 1.0}), ["100% attention calls that ... one at a time, or of one length"]),
        ("dd", SPARSE, dict(stayed={"backend": 1.0}), ["100% attention calls ... a step cache, or name a backend"]),
        ("dr", SPARSE, dict(seconds={"r": 0.95}), [f"51% {DENSE}_steps = 0.2", "49% thinned-out ... longer clips"]),
        ("d" * 9, CACHE, dict(log="first steps", first=10.0), ["53% the first forward's ... ", f"47% {WARMUP}"]),
        ("dddd", CACHE, dict(log="first steps", before=4.0), ["75% between the forwards ... ", f"25% {WARMUP}"]),
        ("dsd", CACHE, dict(log="first steps", fetching={"d": 0.5}), ["50% waiting ... ", f"50% {WARMUP}"]),
        ("dee", {"pag": {}}, {}, ["60% forwards ... a step cache", "40% further forwards ... "]),
        ("dr", CACHE, dict(log="first steps", reused=(1,)), [f"67% {WARMUP}", "33% what easycache computes ... "]),
        ("drrr", SPARSE, PARTS, [  # 2.5 s: a dense forward, and three of half a second
            f"40% {DENSE}_steps = 0.2", "30% what is not self-attention ... alone 2.50 is the most",
            "6% planning attention calls ... ", "6% attention calls over a part of the keys ... "]),
    ):  # fmt: skip
        lines = why(drawn, methods, **options)
        assert len(lines) == len(expected)
        for line, text in zip(lines, expected, strict=True):
            start, advice = text.split(" ... ")
            assert line.startswith(start)
            assert advice in line
    where = dict(transformer="transformer", step_index=0, branch="cond")
    steps = [StepReport(**where, dense_layers=3, sparse_layers=0, density=1.0, pooled=0.0)]
    assert Report(methods={}, backend="torch", model={}, steps=steps, timing=timing("dd")).why_not_faster() == []


def test_attention_that_stayed_dense_takes_its_share_of_the_attention_s_time():
    """Of .54 s of attention in a forward a third is that of a layer that stays dense, a third of calls with a mask."""
    options = dict(dense_layers=2 / 3, seconds={"r": 0.9}, stayed={"mask": 1 / 3})
    lines = why("rrdd", SPARSE, attention={"d": 0.6, "r": 0.6}, **options)
    assert (
        "11% attention calls that stayed dense in forwards that were thinned out; lower sol.dense_layers = 1" in lines
    )
    lines = why("dr", SPARSE, attention={"d": 0.6, "r": 0.55}, seconds={"r": 0.95})
    assert any(line.startswith("28% thinned-out attention") for line in lines)


def test_a_report_begins_with_whether_it_helped_and_parts_are_timed_in_forwards_one_two_four_and_so_on():
    report = run(RADIAL)
    forwards = report.timing.forwards
    assert [place for place, one in enumerate(forwards) if one.attention is not None] == [1, 2, 4, 8, 16]
    assert all(0 < one.attention < one.seconds for one in forwards if one.attention is not None)
    assert all((one.lists > 0) == (one.kind == "reduced") for one in forwards)
    assert 0 < report.timing.share("attention", "dense") < 1
    assert all(one.fetching is None for one in forwards)
    assert any("what is not self-attention" in line for line in report.why_not_faster())
    report = run(EasyCache(threshold=1e-9, warmup_steps=0.2), SolAttention(block_size=16, dense_steps=0))
    first, *others = str(report).split("\nin detail:\n")[0].splitlines()
    assert first.startswith("measured speed-up: ")
    assert others[0].startswith("why not faster: ")
    assert any("easycache.threshold = 1e-09" in line for line in report.why_not_faster())
    assert report.to_dict()["why_not_faster"] == report.why_not_faster()


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


def test_no_further_cache_is_advised_beside_one_of_diffusers():
    cache, sol = diffusers.FirstBlockCacheConfig(threshold=0.4), SolAttention(block_size=16, min_tokens=1000)
    for method, enabled in ((cache, False), (sol, True)):
        transformer = tiny_transformer()
        if enabled:
            transformer.enable_cache(cache)
        with dit_accel.attach(transformer, method, backend="torch") as attachment:
            denoise(transformer, 12)
            report = attachment.report()
        assert {"dense", "reduced"} == {one.kind for one in report.timing.forwards}
        lines = " ".join(report.why_not_faster())
        assert "step cache" not in lines
        if not enabled:
            assert "no method acted" not in lines
            assert "diffusers' FirstBlockCacheConfig computed; loosen its options" in lines


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
