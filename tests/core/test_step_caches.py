"""The engine of step caches, on made-up forwards: which are computed, whose state is read, what a forecast gives."""

from types import SimpleNamespace

import pytest
import torch
from cache_calls import Driven, line, run_through, still
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from wan_tiny import tiny_transformer

from dit_accel import ConfigError, EasyCache, StaticCache
from dit_accel.adapters.guidance import Guidance
from dit_accel.methods.caches.cache_config import is_unconditional
from dit_accel.methods.caches.log import CachedForward, section_of
from dit_accel.methods.find import resolve_model
from dit_accel.methods.registry import handler_of

EVERY = dict(warmup_steps=0, last_steps=0)


def places(drawn: str) -> tuple[int, ...]:
    """The steps that are skipped in a drawing of a run."""
    return tuple(place for place, sign in enumerate(drawn) if sign == ".")


def cache(**options):
    return StaticCache(**{"every": 100, **EVERY, **options})


def test_a_list_decides_which_steps_are_computed():
    driven = Driven(StaticCache(steps=(1, 0, 0, 1, 0)), line)
    given = run_through(driven, still, steps=5)
    assert driven.drawn(steps=5) == "#..#."
    assert [float(out["cond"].mean()) for out in given] == [0, 0, 0, 3, 3]


@pytest.mark.parametrize(
    ("options", "drawn", "measured"),
    [
        (dict(), "#.........", "##........"),
        (dict(warmup_steps=3), "###.......", "###......."),
        (dict(warmup_steps=0.25), "###.......", "###......."),
        (dict(last_steps=2), "#.......##", "##......##"),
        (dict(max_consecutive=2), "#..#..#..#", "##..#..#.."),
        (dict(max_consecutive=0.15), "#..#..#..#", "##..#..#.."),
        (dict(max_consecutive=3, growing=True, last_steps=1), "#.#.#..#.#", "##.#..#..#"),
        (dict(warmup_steps=2, max_consecutive=3, last_steps=1), "##...#...#", "##...#...#"),
    ],
)
def test_guards(options, drawn, measured):
    driven = Driven(cache(**options), line)
    run_through(driven, still)
    assert driven.drawn() == drawn
    assert driven.handler.settings.skipped_steps(10) == places(drawn)
    forever = Driven(EasyCache(threshold=1e9, **{**EVERY, **options}), line)
    run_through(forever, lambda step: torch.full((1, 2, 3), float(step)))
    assert forever.drawn() == measured  # a rate takes two computed steps


def test_the_usual_schedule():
    driven = Driven(StaticCache(), line)
    run_through(driven, still, 11)
    assert driven.drawn(steps=11) == "##.#.#.#.##"
    assert driven.handler.settings.every == 2


@pytest.mark.parametrize(("warmup", "drawn"), [(0, "#....#...."), (3, "###....#..")])
def test_one_step_in_so_many(warmup, drawn):
    driven = Driven(StaticCache(every=5, warmup_steps=warmup, last_steps=0), line)
    run_through(driven, still)
    assert driven.drawn() == drawn


@pytest.mark.parametrize(
    ("options", "given"),
    [
        (dict(), [0, 1, 1, 1, 1]),
        (dict(predictor="taylor"), [0, 1, 2, 3, 4]),
        (dict(predictor="heun"), [0, 1, 2, 3, 4]),
        (dict(predictor="chebyshev"), [0, 1, 2, 3, 4]),
        (dict(predictor="taylor", reach=1), [0, 1, 2, 1, 1]),
        (dict(predictor="heun", reach=0.55), [0, 1, 2, 3, 1]),  # two of five steps
    ],
)
@pytest.mark.parametrize("stored", ["residual", "output"])
def test_what_is_stored_goes_on_in_time(options, given, stored):
    driven = Driven(StaticCache(steps=(1, 1, 0, 0, 0), stored=stored, **options), line)
    out = run_through(driven, still, steps=5)
    rough = dict(abs=0.1) if options.get("predictor") == "chebyshev" else {}  # its ridge
    assert [float(one["cond"].mean()) for one in out] == pytest.approx(given, **rough)


def test_what_was_held_out_of_reach_is_no_point_of_the_next_forecast():
    driven = Driven(StaticCache(steps=(1, 1, 0, 0, 1, 0), predictor="heun", reach=1), line)
    assert [float(one["cond"].mean()) for one in run_through(driven, still, steps=6)] == [0, 1, 2, 1, 4, 5]


def test_the_residual_is_added_to_the_latents_of_the_step():
    moving = lambda step: torch.full((1, 2, 3), 10.0 * step)  # noqa: E731
    held = {}
    for stored in ("residual", "output"):
        driven = Driven(StaticCache(steps=(1, 0), stored=stored), line)
        held[stored] = float(run_through(driven, moving, steps=2)[1]["cond"].mean())
    assert held == {"residual": 10.0, "output": 0.0}


def test_only_the_latent_part_of_a_wider_input_is_taken_off():
    wide = torch.arange(30.0).reshape(1, 5, 6)
    driven = Driven(StaticCache(steps=(1, 0)), lambda step, branch: (torch.ones(1, 2, 6),))
    driven.forward(0, wide, steps=2)
    assert torch.equal(driven.forward(1, wide + 1, steps=2)[0], torch.full((1, 2, 6), 2.0))
    for shape in ((1, 2, 7), (1, 2, 1, 6)):  # not covered by the latents: the output is held
        driven = Driven(StaticCache(steps=(1, 0)), lambda step, branch, shape=shape: (torch.ones(shape),))
        driven.forward(0, wide, steps=2)
        assert torch.equal(driven.forward(1, wide + 1, steps=2)[0], torch.ones(shape))


def test_outputs_of_every_form():
    sample, sound = torch.ones(1, 2, 3), torch.full((1, 4), 2.0)
    forms = {
        "object": Transformer2DModelOutput(sample=sample),
        "tuple": (sample, sound),
        "list": ([sample, sample + 1],),
        "none": (sample, None),
    }
    for name, output in forms.items():
        driven = Driven(StaticCache(steps=(1, 0)), lambda step, branch, output=output: output)
        first, second = (driven.forward(step, still(step), steps=2) for step in range(2))
        assert first is output
        assert type(second) is type(output), name
        if name == "object":
            assert torch.equal(second.sample, sample)
        elif name == "tuple":
            assert torch.equal(second[0], sample)
            assert torch.equal(second[1], sound)
        elif name == "list":
            assert torch.equal(second[0][1], sample + 1)
        else:
            assert second[1] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types_stay(dtype):
    driven = Driven(StaticCache(steps=(1, 1, 0), predictor="taylor"), lambda *_: (torch.ones(1, 2, 3, dtype=dtype),))
    out = [driven.forward(step, torch.zeros(1, 2, 3, dtype=dtype), steps=3)[0] for step in range(3)]
    assert out[2].dtype == dtype
    torch.testing.assert_close(out[2], out[0])


def test_what_a_pipeline_writes_into_stays_its_own():
    output = torch.ones(1, 2, 3)
    driven = Driven(StaticCache(steps=(1, 0, 0)), lambda step, branch: (output,))
    driven.forward(0, still(0), steps=3)[0].zero_()
    driven.forward(1, still(1), steps=3)[0].zero_()
    assert torch.equal(driven.forward(2, still(2), steps=3)[0], torch.ones(1, 2, 3))


def test_branches_have_state_of_their_own():
    both = Driven(StaticCache(steps=(1, 1, 0, 0), predictor="taylor"), line)
    together = run_through(both, still, 4, ("cond", "uncond"))
    for branch in ("cond", "uncond"):
        driven = Driven(StaticCache(steps=(1, 1, 0, 0), predictor="taylor"), line)
        alone = run_through(driven, still, 4, (branch,))
        assert all(torch.equal(one[branch], two[branch]) for one, two in zip(together, alone, strict=True))


def test_the_first_branch_of_a_step_decides_for_all():
    def output(step, branch):
        grows = 1.0 if branch == "cond" else float("inf")
        return (torch.full((1, 2, 3), 1 + 0.001 * grows * step),)

    driven = Driven(EasyCache(threshold=0.05, warmup_steps=2, last_steps=1), output)
    run_through(driven, lambda step: torch.full((1, 2, 3), float(step)), branches=("cond", "uncond"))
    assert driven.drawn() == driven.drawn("uncond") == "##.......#"
    values = [entry["value"] for entry in driven.handler.report().data["forwards"] if entry["branch"] == "uncond"]
    assert values == [None] * 10


def test_only_the_unconditional_branch_is_skipped():
    driven = Driven(cache(branches="uncond", warmup_steps=2, last_steps=1), line)
    run_through(driven, still, branches=("cond", "uncond"))
    assert (driven.drawn(), driven.drawn("uncond")) == ("##########", "##.......#")
    assert all(is_unconditional(branch, "x") for branch in ("uncond", "cond/uncond", "pred_uncond"))
    assert not any(is_unconditional(branch, "x") for branch in ("cond", "pred_cond", "uncond/perturbed"))


def test_branches_that_can_not_be_told_apart_are_refused():
    for branch, why in (("call 1", "cache_context"), ("cond_uncond", "both in one")):
        driven = Driven(cache(branches="uncond"), line)
        with pytest.raises(ConfigError, match=rf"^staticcache\.branches = 'uncond'.*{why}"):
            driven.forward(0, still(0), branch)


def test_a_branch_that_comes_or_goes_midway():
    driven = Driven(cache(warmup_steps=2), line)
    for step in range(5):
        for branch in ("cond",) if step in (2, 3) else ("cond", "uncond"):
            driven.forward(step, still(step), branch)
    assert driven.drawn(steps=5) == driven.drawn("uncond", 5) == "##..."
    late = Driven(cache(), line)
    for step in range(4):
        for branch in ("cond",) if step < 2 else ("cond", "uncond"):
            late.forward(step, still(step), branch)
    assert late.drawn(steps=4) == "#..."
    assert late.drawn("uncond", 4) == "..#."  # nothing was stored before


def test_a_branch_that_comes_to_lead_is_measured_by_itself():
    """Where the first branch of the steps ends, the other one's outputs are not compared with that one's."""
    ends = 4
    measured = Driven(EasyCache(threshold=1e9, **EVERY), line)
    counted = Driven(cache(max_consecutive=4), line)
    for step in range(9):
        for branch in ("uncond", "cond") if step < ends else ("cond",):
            measured.forward(step, torch.full((1, 2, 3), float(step)), branch)
            counted.forward(step, still(step), branch)
    assert measured.drawn(steps=9) == "##..##..."  # a rate takes two computed steps of one branch
    assert counted.drawn(steps=9) == "#....#..."  # it goes on counting what was skipped in a row


def test_another_expert_drops_what_was_stored():
    driven = Driven(cache(predictor="taylor"), line)
    for step in range(6):
        driven.forward(step, still(step), transformer="transformer" if step < 3 else "transformer_2")
    assert driven.drawn(steps=6) == "#..#.."
    assert len(driven.handler._histories) == 1


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
        (dict(warmup_steps=2, warmup_of="last"), "#####|##..."),
        (dict(warmup_steps=0.6, warmup_of="last", last_steps=1), "#####|###.#"),
    ],
)
def test_what_the_first_steps_are_the_first_of(options, drawn):
    steps = len(drawn) - 1
    driven = Driven(EasyCache(threshold=1e9, **{**EVERY, **options}), line)
    driven.handler.first_expert = lambda: 0.5
    driven.install("transformer", "transformer_2")
    measured = drawn.replace("|#.", "|##")  # a rate takes two computed steps
    for run in range(2):
        driven.ran.clear(), driven.handler.reset(), driven.handler.begin_run()
        for step in range(steps):
            name = "transformer" if step < drawn.index("|") else "transformer_2"
            driven.forward(step, torch.full((1, 2, 3), float(step)), steps=steps, transformer=name)
        assert driven.drawn(steps=steps) == measured.replace("|", ""), run
    assert cache(**options).skipped_steps(steps, switch=drawn.index("|")) == places(drawn.replace("|", ""))


def test_a_transformer_alone_makes_all_steps_of_which_a_share_are_its_first():
    config = cache(warmup_steps=0.5, warmup_of="each")
    assert config.first_steps(10) == 5
    assert [config.always_computed(index, 10) for index in (4, 5)] == ["first steps", None]


def test_steps_at_points_of_the_run():
    for steps, computed in ((10, "#..#.....#"), (28, "#........#.................#"), (1, "#")):
        driven = Driven(cache(compute_at=(1 / 3, 1.0)), line)
        run_through(driven, still, steps=steps)
        assert driven.drawn(steps=steps) == computed
        assert driven.handler.settings.skipped_steps(steps) == places(computed)
    with pytest.raises(
        ConfigError,
        match=r"^staticcache\.compute_at.*steps",
    ):
        Driven(cache(compute_at=(0.5,)), line).forward(0, still(0), steps=None)


@pytest.mark.parametrize(("steps", "computed"), [(10, "#..#.....#"), (28, "#........#.................#")])
def test_points_alone_are_the_whole_list(steps, computed):
    driven = Driven(StaticCache(compute_at=(0.0, 1 / 3, 1.0)), line)
    run_through(driven, still, steps=steps)
    assert driven.drawn(steps=steps) == computed
    beside = Driven(StaticCache(compute_at=(0.4,), every=5), line)
    run_through(beside, still)
    assert beside.drawn() == "#...##...#"  # with the usual first and last steps


def test_a_share_of_a_first_expert_of_unknown_length_is_refused():
    driven = Driven(cache(warmup_steps=0.4, warmup_of="each"), line)
    driven.install("transformer", "transformer_2")
    with pytest.raises(
        ConfigError,
        match=r"^staticcache\.warmup_of = 'each'.*staticcache\.warmup_steps = 0\.4",
    ):
        driven.forward(0, still(0))


def test_two_calls_a_step_follow_one_decision():
    driven = Driven(cache(warmup_steps=2, predictor="taylor"), line)
    for step in range(4):
        for _ in range(2):
            out = driven.forward(step, still(step))[0]
            assert float(out.mean()) == step
    assert driven.ran == [(0, "cond")] * 2 + [(1, "cond")] * 2


def test_another_shape_or_type_is_computed_afresh():
    driven = Driven(cache(predictor="taylor"), lambda step, branch: (torch.ones(1, 2, 3),))
    for step, latents in enumerate((still(0), still(0), torch.zeros(1, 2, 4), torch.zeros(1, 2, 4).double())):
        driven.forward(step, latents)
    assert driven.drawn(steps=4) == "#.##"


def test_nothing_is_reused_between_runs():
    driven = Driven(cache(), line)
    driven.forward(0, still(0))
    driven.handler.reset(), driven.handler.begin_run()
    driven.forward(1, still(1))
    assert driven.ran == [(0, "cond"), (1, "cond")]
    assert driven.handler.report().data["computed"] == 1


def test_gradients_and_training_are_computed():
    driven = Driven(cache(), line)
    driven.forward(0, still(0))
    driven.forward(1, still(1), training=True)
    leaf = still(2).requires_grad_()
    driven.forward(2, leaf)
    with torch.no_grad():
        driven.forward(3, leaf)
    assert driven.drawn(steps=4) == "###."
    weight = torch.ones(1, requires_grad=True)
    learning = Driven(cache(), lambda step, branch: (weight * torch.ones(1, 2, 3),))
    run_through(learning, still, 3)
    assert learning.drawn(steps=3) == "###"


def test_a_step_that_another_method_needs_is_computed():
    other = SimpleNamespace(name="other", needs_step=lambda step: step.step_index in (2, 5))
    driven = Driven(cache(), line, others=(other,))
    run_through(driven, still)
    assert driven.drawn() == "#.#..#...."
    reasons = [entry["reason"] for entry in driven.handler.report().data["forwards"]]
    assert reasons[2] == "other needs it"


def test_memory_is_counted_and_freed():
    for options, tensors in (
        (dict(), 1), (dict(predictor="taylor", order=2), 3), (dict(predictor="heun"), 3),
        (dict(predictor="chebyshev", order=2), 6),
    ):  # fmt: skip
        driven = Driven(StaticCache(every=3, warmup_steps=6, **options), line)
        run_through(driven, still, branches=("cond", "uncond"))
        assert driven.handler.state_bytes() == tensors * 2 * 24, options
        driven.handler.reset()
        assert not driven.handler._histories


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            dict(warmup_steps=-1),
            r"staticcache\.warmup_steps.*got -1",
        ),
        (
            dict(warmup_steps=1.5),
            r"staticcache\.warmup_steps.*got 1\.5",
        ),
        (
            dict(last_steps=-2),
            r"staticcache\.last_steps.*got -2",
        ),
        (dict(max_consecutive=0), r"staticcache\.max_consecutive.*got 0"),
        (dict(reach=0), r"staticcache\.reach.*got 0"),
        (dict(growing=True), r"staticcache\.growing.*staticcache\.max_consecutive, got None"),
        (
            dict(compute_at=(0.5, 11.0)),
            r"staticcache\.compute_at.*got 11\.0",
        ),
        (dict(warmup_of="all"), r"staticcache\.warmup_of.*got 'all'"),
        (dict(order=0), r"staticcache\.order.*got 0"),
        (dict(predictor="dmd"), r"staticcache\.predictor.*'hold'.*'taylor'.*'heun'.*'chebyshev'"),
        (dict(every=0), r"staticcache\.every.*got 0"),
        (dict(steps=(1, 0)), r"staticcache\.steps = \(1, 0\) and staticcache\.every = 2"),
        (dict(every=None, steps=(1, 2)), r"staticcache\.steps.*got 2"),
        (dict(every=None, steps=(0, 1)), r"staticcache\.steps.*got \[0, 1\]"),
    ],
)
def test_options_out_of_range(options, text):
    with pytest.raises(ConfigError, match=text):
        StaticCache(**{"every": 2, **options})


def test_a_run_of_unknown_or_other_length():
    driven = Driven(StaticCache(steps=(1, 0, 1)), line)
    with pytest.raises(ConfigError, match=r"^staticcache\.steps.*3 entries.*4 steps"):
        driven.forward(0, still(0), steps=4)
    with pytest.raises(ConfigError, match=r"staticcache\.steps.*3 entries.*unknown"):
        driven.forward(0, still(0), steps=None)
    for options, what in (
        (dict(last_steps=1), "last_steps = 1"), (dict(warmup_steps=0.5), "warmup_steps = 0.5"),
        (dict(max_consecutive=0.5), "max_consecutive = 0.5"), (dict(reach=0.5), "reach = 0.5"),
    ):  # fmt: skip
        driven = Driven(cache(**options), line)
        with pytest.raises(ConfigError, match=rf"^staticcache\.{what}.*steps"):
            [driven.forward(step, still(step), steps=None) for step in range(2)]


def test_a_recipe_fills_what_is_unset():
    assert Driven(EasyCache(), line, recipe={"threshold": 0.2}).handler.settings.threshold == 0.2
    assert Driven(EasyCache(threshold=0.1), line, recipe={"threshold": 0.2}).handler.settings.threshold == 0.1
    with pytest.raises(ConfigError, match=r"recipe.*easycache.*'order'"):
        Driven(EasyCache(), line, recipe={"order": 2})


@pytest.mark.parametrize("stored", ["residual", "output"])
@pytest.mark.parametrize("predictor", ["hold", "taylor", "heun", "chebyshev"])
def test_a_forecast_that_is_written_into_is_not_what_later_ones_are_made_of(predictor, stored):
    def given(spoil):
        driven = Driven(StaticCache(steps=(1, 1, 0, 0, 0), stored=stored, predictor=predictor), line)
        outputs = []
        for step in range(5):
            out = driven.forward(step, still(step), steps=5)[0]
            outputs.append(out.clone())
            if spoil:
                out.fill_(float("nan"))
        return outputs

    assert all(torch.equal(one, other) for one, other in zip(given(True), given(False), strict=True))


def test_the_section_counts_what_was_computed():
    entries = [
        CachedForward(transformer="transformer", step_index=step, branch="cond", reused=step > 0, reason="listed")
        for step in range(3)
    ]
    section = section_of("made-up", entries, None)
    assert (section.data["computed"], section.data["reused"]) == (1, 2)
    assert section.title == "made-up: 2 of 3 forwards reused (# computed, . reused)"


def test_a_run_whose_length_is_not_known_ends_with_the_step_that_runs():
    """Where Chebyshev's polynomials are laid over the steps from the first to the last."""
    model = resolve_model("transformer", {"transformer": tiny_transformer()})
    handler = handler_of(StaticCache())(StaticCache(), model)
    assert handler._end(SimpleNamespace(num_inference_steps=None, step_index=4)) == 4
    assert handler._end(SimpleNamespace(num_inference_steps=10, step_index=4)) == 9


@pytest.mark.parametrize(
    ("threshold", "line"), [(None, "indicator 0.1 to 0.3"), (0.25, "indicator 0.1 to 0.3, threshold 0.25")]
)
def test_the_indicator_stands_beside_its_threshold_where_there_is_one(threshold, line):
    entries = [
        CachedForward(transformer="transformer", step_index=step, branch="cond", reused=False, reason="", value=value)
        for step, value in enumerate((None, 0.3, 0.1, float("nan")))
    ]
    assert section_of("made-up", entries, threshold).lines[-1] == line
