"""Methods under context parallelism: several processes give what one gives, or each says alike why they can't."""

import parallel_ranks
import pytest
import torch.distributed as dist
from parallel_ranks import compare, processes

from dit_accel import (
    DFA,
    LVSA,
    NAG,
    PAG,
    SLG,
    DBCache,
    DBPrune,
    DeltaAttention,
    EasyCache,
    FirstBlockCache,
    LiteAttention,
    MagCache,
    ProfilingCache,
    RadialAttention,
    RoPE,
    SoftPAG,
    SolAttention,
    SparseD,
    StaticCache,
    TeaCache,
    UltraImage,
    UltraViCo,
)  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
]

LITE = dict(block_size=16, dense_steps=0, dense_layers=0)
ALWAYS = dict(LITE, dense_last_steps=0)
RADIAL = dict(decay_factor=0.2, near="half", sink=False, **ALWAYS)
SPARSED = SparseD(density=0.5, **ALWAYS)
SKIPS = dict(threshold=9.0, warmup_steps=1, max_consecutive=1)

IMAGES = {
    "lite": (LiteAttention(threshold=-0.5, **LITE),),
    "lite, target density": (LiteAttention(target_density=0.5, **LITE),),
    "lite, ranges": (LiteAttention(must_skip=(0, 32), **LITE),),
    "sparsed, mass": (SparseD(mass=0.7, **ALWAYS),),
    "sol": (SolAttention(beta=0.0, **ALWAYS),),
    "delta": (SPARSED, DeltaAttention(stride=8)),
    "ultraimage": (UltraImage(trained_height=2, trained_width=2, focus_max=2.0, rows=16),),
    "rope": (RoPE(kind="pi", trained_height=2, trained_width=2),),
    "softpag": (SoftPAG(heads=("L1H1", "L2H2-3"), scale=1.0),),
    "pag": (PAG(layers="L1", scale=1.0),),
    "slg": (SLG(layers="L1", scale=1.0),),
    "easycache": (EasyCache(**SKIPS),),
    "firstblockcache": (FirstBlockCache(**SKIPS),),
    "profilingcache": (ProfilingCache(blocks="0-1", every=2, warmup_steps=1),),
    "lite + softpag + firstblockcache": (
        LiteAttention(threshold=-0.5, **LITE), SoftPAG(heads="L1H2", scale=1.0), FirstBlockCache(**SKIPS),
    ),
}  # fmt: skip
VIDEOS = {
    **IMAGES,
    "radial": (RadialAttention(**RADIAL),),
    "ultravico": (UltraViCo(trained_frames=2, alpha=0.5, beta=0.2, period=3, gamma=0.5, first_frame=True),),
    "dfa": (DFA(every=2, warmup_steps=1, last_steps=0),),
    "radial + lite + easycache": (
        RadialAttention(**RADIAL), LiteAttention(threshold=-0.5, **LITE), EasyCache(**SKIPS),
    ),
}  # fmt: skip
WAN = {
    **VIDEOS,
    "radial, pooled": (RadialAttention(rest="pooled", **RADIAL),),
    "lvsa": (LVSA(block_size=16, trained_frames=2, window=0),),
    "softpag, temperature": (SoftPAG(heads=("L1H1", "L2H2-3"), scale=1.0, target="temperature"),),
    "slg, first block": (SLG(layers="L0", scale=1.0),),
    "teacache": (TeaCache(polynomial=(1.0, 0.0), **SKIPS),),
    "magcache": (MagCache(ratios=(1.0,) * 4, **SKIPS),),
    "staticcache": (StaticCache(every=2, warmup_steps=1),),
    "dbcache": (DBCache(first_blocks=1, last_blocks=1, **SKIPS),),
    "dbprune": (DBPrune(threshold=0.5, warmup_steps=1, max_consecutive=1),),
    "delta + lite": (LiteAttention(threshold=-0.5, **LITE), DeltaAttention(stride=8)),
    "radial + ultravico + softpag": (
        RadialAttention(**RADIAL), UltraViCo(trained_frames=2, alpha=0.5), SoftPAG(heads="L1H2", scale=1.0),
    ),
}  # fmt: skip
TOGETHER = "radial + lite + easycache"
FEW = ("lite, target density", "lite, ranges", "delta", "ultraimage", "softpag", "firstblockcache")


@pytest.mark.parametrize(
    ("model", "world", "cases", "sizes", "options"),
    [
        ("wan", 2, WAN, {}, {}),
        ("hunyuan-video", 2, {name: VIDEOS[name] for name in (*FEW, "rope", "ultravico", TOGETHER)}, {}, {}),
        ("flux", 2, {name: IMAGES[name] for name in (*FEW, "sparsed, mass", "sol", "rope", "slg")}, {}, {}),
        ("wan", 4, {name: WAN[name] for name in (*FEW, "radial + ultravico + softpag")}, {}, {}),
        ("flux", 2, {name: IMAGES[name] for name in FEW}, dict(heads=5, text=7), {"ulysses_anything": True}),
    ],
    ids=["wan", "hunyuan-video", "flux", "wan on 4", "flux of odd text and heads"],
)
def test_processes_give_what_one_gives(model, world, cases, sizes, options):
    found = processes(world, compare, model, cases, sizes, options)
    assert sorted(found) == list(range(world))
    for name in cases:
        for rank in range(world):
            assert not isinstance(found[rank], str), found[rank]
            assert not isinstance(found[rank][name], str), (name, rank, found[rank][name])
            away, changed = found[rank][name]
            assert away < 1e-5 < changed, (name, rank)


def test_negative_text_and_methods_attached_before():
    found = processes(2, parallel_ranks.attach_first, NAG, (RadialAttention(**RADIAL), WAN["rope"][0], *WAN["softpag"]))
    for rank in (0, 1):
        assert not isinstance(found[rank], str), found[rank]
        text, together, dense, gradient = found[rank]
        assert text < 1e-5
        assert together < 1e-5
        assert dense == 0
        assert gradient < 1e-5


def test_what_cannot_be_right_is_refused_on_every_process_alike():
    found = processes(2, parallel_ranks.refused)
    assert not isinstance(found[0], str), found[0]
    assert found[0] == found[1]
    for what, words in {
        "heads": "ConfigError: ulysses_degree = 2 does not divide the 3 heads of transformer",
        "too few heads": "ConfigError: ulysses_degree = 2 leaves a process none of the 1 heads of transformer",
        "ring": "ConfigError: lite: ring_degree = 2 gives no process a whole row of attention",
        "native": "is diffusers' own cache, whose processes would decide each by its own tokens",
        "undescribed": "ConfigError: lite: the adapter 'ltx' does not say how context parallelism splits its tokens",
        "settings": "ConfigError: the processes that run transformer together disagree: methods is {'lite'",
        "methods": "ConfigError: the processes that run transformer together disagree: methods is {'easycache'",
        "steps": "num_inference_steps is 4 on rank 0 and 5 on rank 1",
        "seeds": "begin with other latents on rank 1 than on rank 0; give the pipeline a generator of the same seed",
    }.items():
        assert words in found[0][what], what


def test_groups_of_processes_share_a_transformer_each():
    found = processes(4, parallel_ranks.groups, (RadialAttention(**RADIAL), EasyCache(**SKIPS)))
    for rank in range(4):
        assert not isinstance(found[rank], str), found[rank]
        away, told, refusals = found[rank]
        assert away < 1e-5
        assert told == found[rank // 2 * 2][1] != found[3 - rank][1]
        assert refusals == [
            "ConfigError: ulysses = 3 does not divide the 4 processes that were started; start a multiple of 3, such "
            "as torchrun --nproc-per-node 3",
            "ConfigError: ulysses = 4 does not divide the transformer's 6 heads; choose of 1, 2, 3, 6",
            "ConfigError: diffusers has no plan of how MochiTransformer3DModel is split over processes; run it on one "
            "(ulysses = 1)",
        ]


@pytest.mark.parametrize("fault", ["killed", "stuck"])
def test_a_lost_process_is_an_error_on_the_others(fault):
    found = processes(2, parallel_ranks.lose_one, fault, seconds=15)
    assert found[0].startswith(
        "ProcessLost: another of the 2 processes that run transformer together ended or no longer"
    )
    assert "look for the first error among their outputs, and start all again" in found[0]
