"""Methods under context parallelism, offloaded too: processes give what one gives, or say alike why they can't."""

import offloaded_ranks
import parallel_ranks
import pytest
import torch.distributed as dist
from offloaded_ranks import KINDS, ORDERS
from parallel_cases import FEW, RADIAL, SKIPS, VIDEOS_ALONE, cases_of, ring_cases
from parallel_ranks import compare, processes

from dit_accel import NAG, EasyCache, LiteAttention, RadialAttention
from dit_accel.methods.registry import methods

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")]

IMAGE, VIDEO = cases_of(image=True), cases_of(image=False)


def test_no_method_is_left_out():
    for cases, apart in ((VIDEO, set()), (IMAGE, VIDEOS_ALONE)):
        tried = {method.name for case in cases.values() for method in case}
        assert tried == set(methods()) - apart - {"referencecache"}  # which keeps nothing there


def run(world, work, *arguments, **options):
    """Run in some processes; return what each gave, of whom none broke."""
    results = processes(world, work, *arguments, **options)
    assert sorted(results) == list(range(world))
    assert not [one for one in results.values() if isinstance(one, str)]
    return [results[rank] for rank in range(world)]


def require_as_alone(ranks, cases):
    """Require that each process's outputs are one process's, which the methods changed."""
    for rank, results in enumerate(ranks):
        assert len(results) == cases
        for case, result in results.items():
            assert not isinstance(result, str), (case, rank, result)
            away, changed = result
            assert away < 1e-5 < changed, (case, rank)


def without(cases, *names):
    """Leave out methods that a model refuses, or that act on guidance, which more than two processes run without."""
    return {name: methods for name, methods in cases.items() if name not in names}


ALIKE = [
    *((model, world, without(cases, "cfgcache") if world > 2 else cases, {}, {})
      for model, cases in (("wan", VIDEO), ("hunyuan-video", without(VIDEO, "progressive")), ("flux", IMAGE))
      for world in (2, 4)),
    ("wan", 2, ring_cases(image=False), {}, {"ring_degree": 2}),
    ("wan", 4, without(ring_cases(image=False), "cfgcache"), {}, {"ring_degree": 4}),
    ("flux", 2, ring_cases(image=True), {}, {"ring_degree": 2}),
    ("flux", 2, {name: IMAGE[name] for name in FEW}, dict(heads=5, text=7), {"ulysses_anything": True}),
]  # fmt: skip


def name_of(value):
    return str(value) if isinstance(value, str | int) else ""


@pytest.mark.parametrize(("model", "world", "cases", "sizes", "options"), ALIKE, ids=name_of)
def test_processes_give_what_one_gives(model, world, cases, sizes, options):
    require_as_alone(run(world, compare, model, cases, sizes, options), len(cases))


def test_further_models_give_what_one_process_gives():
    models = ("qwen-image", "qwen-image-edit", "flux2", "flux2 with references", "chronoedit", "minimax-h3")
    cases = {name: IMAGE[name] for name in ("lite, ranges", "delta", "firstblockcache")}
    require_as_alone(run(2, parallel_ranks.compare_each, models, cases), len(models) * len(cases))


def test_a_weaker_model_is_shared_where_its_heads_can_be_and_left_as_it_was():
    for results in run(2, parallel_ranks.weaker_models):
        for heads, tokens in ((4, 40), (3, 80)):
            away, seen, left, same = results[heads]
            assert away < 1e-5, heads
            assert (seen, left, same) == ([tokens], 0, True), heads


def test_compiled_blocks_give_what_one_process_gives_in_two_graphs():
    cases = {name: VIDEO[name] for name in ("radial + lite + easycache", "firstblockcache")}
    for results in run(2, parallel_ranks.compiled, cases, dict(backend="eager", fullgraph=True)):
        for case, (away, graphs) in results.items():
            assert away < 1e-5, case
            assert graphs <= 2, case


def test_negative_text_and_methods_attached_before():
    methods = (RadialAttention(**RADIAL), *VIDEO["rope"], *VIDEO["softpag"])
    for text, together, dense, gradient in run(2, parallel_ranks.attach_first, NAG, methods):
        assert max(text, together, gradient) < 1e-5
        assert dense == 0


def test_observers_see_each_processs_rows_under_ring_attention():
    for calls, away, rows in run(2, parallel_ranks.observed, (RadialAttention(**RADIAL),)):
        assert (calls, rows) == (2 * 2 * 3, [40])
        assert away < 1e-5


def test_processes_that_train_compare_what_they_run_once():
    assert run(2, parallel_ranks.trained, (RadialAttention(**RADIAL),)) == [1, 1]


def test_what_cannot_be_right_is_refused_on_every_process_alike():
    results = run(2, parallel_ranks.refused)
    assert results[0] == results[1]
    for what, words in {
        "heads": "ConfigError: ulysses_degree = 2 does not divide the 3 heads of transformer",
        "too few heads": "ConfigError: ulysses_degree = 2 leaves a process none of the 1 heads of transformer",
        "ring": "ConfigError: lite: ring_degree = 2 leaves a process the queries of its own tokens alone",
        "ring, of two": "ConfigError: sol: ring_degree = 2 leaves a process the queries of its own tokens alone",
        "native": "is diffusers' own cache, whose processes would decide each by its own tokens",
        "undescribed": "ConfigError: lite: the adapter 'ltx' does not say how context parallelism splits its tokens",
        "settings": "ConfigError: the processes that run transformer together disagree: methods is {'lite'",
        "methods": "ConfigError: the processes that run transformer together disagree: methods is {'easycache'",
        "steps": "num_inference_steps is 4 on rank 0 and 5 on rank 1",
        "seeds": "begin with other latents on rank 1 than on rank 0; give the pipeline a generator of the same seed",
    }.items():
        assert words in results[0][what], what


def test_groups_of_processes_share_a_transformer_each():
    results = run(4, parallel_ranks.groups, (RadialAttention(**RADIAL), EasyCache(**SKIPS)))
    for rank, (away, number, refusals) in enumerate(results):
        assert away < 1e-5
        assert number == results[rank // 2 * 2][1] != results[3 - rank][1]
        assert refusals == [
            "ConfigError: ulysses = 3 does not divide the 4 processes that were started; start a multiple of it, such "
            "as torchrun --nproc-per-node 3, or choose another",
            "ConfigError: ulysses = 4 does not divide the transformer's 6 heads; choose of 1, 2, 3, 6",
            "ConfigError: diffusers has no plan of how MochiTransformer3DModel is split over processes; run it on one, "
            "without ulysses",
        ]


@pytest.mark.parametrize("fault", ["killed", "stuck"])
def test_a_lost_process_is_an_error_on_the_others(fault):
    results = processes(2, parallel_ranks.lose_one, fault, seconds=15)
    assert results[0].startswith(
        "ProcessLost: another of the 2 processes that run transformer together ended or no longer"
    )
    assert "look for the first error among their outputs, and start all again" in results[0]


METHODS = (
    RadialAttention(decay_factor=0.2, near="half", sink=False, block_size=16, dense_steps=0, dense_layers=0),
    LiteAttention(threshold=-0.5, dense_steps=0, dense_layers=0),
    EasyCache(threshold=9.0, warmup_steps=1, max_consecutive=1),
)


def test_offloaded_processes_give_what_one_gives():
    require_as_alone(run(2, offloaded_ranks.compare, METHODS), len(KINDS) * len(ORDERS))
