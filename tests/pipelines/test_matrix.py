"""Every stock pipeline of diffusers that an adapter covers, with every method, in every situation of a user's day.

Each row of a batch is that row alone, a second run is the first, whatever ran before; what does not go together is
refused by name, as the adapter declares. `make test` runs one case of as few pipelines as have every method and every
situation, `make test-slow` one of every pipeline and every method on a third of them, `make test-rare` on the others,
`make test-pipelines` all cases.
"""

import pytest
from matrix_cases import Case, cases_of, few, many, plain_of, quick, wrong_in
from matrix_classes import covered, pipeline_classes
from matrix_limits import forwards_of, found_of, limits, refused_of
from matrix_methods import METHODS, names_of
from matrix_situations import SITUATIONS
from tiny_stock import NOT_BUILT, PIPELINES

from dit_accel.methods.registry import handlers

KIN = ("LTX2InContextPipeline", "LTX2ImageToVideoPipeline", "LTX2ModularPipeline")
"""Pipelines of long runs beside the LTX2Pipeline, around the same transformer."""

OPEN = ("HunyuanImagePipeline", "QwenImageLayeredModularPipeline")
"""Pipelines with a case that is known to be wrong: SoftPAG after an exception on the first's bare transformer, which
its guider refuses though nothing declares it, and at another guidance scale of the second (.0073 of the norm off)."""

THIRD = [name for name in list(PIPELINES)[::3] if name not in (*KIN, *OPEN)]
"""Pipelines that `make test-slow` runs with every method, `make test-rare` the others."""


def require_right(name: str, cases: list[Case]) -> None:
    """Run cases of a pipeline; all that is wrong is said at once."""
    found = wrong_in(name, sorted(cases, key=lambda case: (case[0], list(SITUATIONS).index(case[1]))))
    assert not found, f"{name}:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[] if one in quick() else pytest.mark.slow) for one in PIPELINES]
)
def test_a_pipeline_is_right_with_a_method_in_a_situation(name):
    assert refused_of(plain_of(name)) == limits()[name].refused, "run tests/support/matrix_limits.py"
    require_right(name, [few()[name]])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[] if one in THIRD else pytest.mark.rare) for one in PIPELINES]
)
def test_a_pipeline_is_right_with_every_method(name):
    require_right(name, many(name))


@pytest.mark.slow
@pytest.mark.rare
@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_is_right_with_every_method_in_every_situation(name):
    require_right(name, cases_of(name))


@pytest.mark.slow
@pytest.mark.rare
@pytest.mark.parametrize("name", PIPELINES)
def test_what_diffusers_cannot_do_is_no_more_than_that(name):
    assert found_of(plain_of(name)) == limits()[name]


def test_every_pipeline_class_is_in_the_matrix():
    classes = set(pipeline_classes())
    built = {name.split(",")[0] for name in PIPELINES}
    assert not classes - built - set(NOT_BUILT), "give tiny_stock a tiny pipeline of each"
    assert not (built | set(NOT_BUILT)) - classes, "these are no pipelines of a covered transformer"
    assert not built & set(NOT_BUILT)
    assert set(limits()) == set(PIPELINES), "run tests/support/matrix_limits.py"
    assert not covered() - set().union(*pipeline_classes().values()), "these transformers have no pipeline"


def test_guidance_comes_in_one_call_and_in_two():
    seen = {name: forwards_of(plain_of(name)) for name in ("WanPipeline", "StableDiffusion3Pipeline", "FluxPipeline")}
    assert seen == {"WanPipeline": (2, 1), "StableDiffusion3Pipeline": (1, 2), "FluxPipeline": (1, 1)}


def test_the_samples_have_every_method_every_situation_and_every_pipeline():
    call = plain_of("WanPipeline").call
    names = {name for of in METHODS.values() for name in names_of(of(call))}
    assert names == set(handlers()) - {"autoguidance"}  # which needs a second model: test_three_branches.py
    methods, situations = zip(*(few()[name] for name in quick()), strict=True)
    assert set(few()) == set(PIPELINES)
    assert set(methods) == set(METHODS)
    assert set(situations) == set(SITUATIONS)
    whole: set[Case] = set()
    for name in PIPELINES:
        cases = [few()[name], *many(name)]
        assert {method for method, _ in cases} == set(METHODS)
        assert {one for _, one in cases} == {one for _, one in cases_of(name)}
        whole |= set(cases)
    assert whole == {(method, one) for method in METHODS for one in SITUATIONS}
