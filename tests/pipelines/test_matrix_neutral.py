"""A perturbation of nothing adds nothing, beside every method and every pair that attaches.

What guidance adds leads away from the perturbed forward. Where that one leaves out other tiles than the conditional
forward, or reuses other steps, it leads away from that difference as well, and of a perturbation of nothing that alone
is left. `make test` tries nearly each method once, `make test-slow` all, with pairs, `make test-rare` in every case.
"""

import contextlib
import copy
from dataclasses import dataclass, replace

import matrix_runs
import pytest
import torch
from diffusers.hooks import MagCacheConfig, TaylorSeerCacheConfig
from matrix_cases import plain_of
from matrix_methods import GUIDING, METHODS, STEPS
from some_cases import some
from wan_tiny import sharp_transformer

import dit_accel as d
from dit_accel.adapters.installed import adapter_for
from dit_accel.attachment.beside import CallsMade
from dit_accel.errors import ConfigError
from dit_accel.methods import Handler, MethodConfig, Phase, registry
from dit_accel.methods.base import Place
from dit_accel.methods.site import sample_of, with_sample
from dit_accel.testing import METHOD_CASES
from dit_accel.testing.promises import check_beside_guidance
from dit_accel.testing.tiny_models import Case, tiny_wan

SPARSE = dict(block_size=16, dense_steps=1, dense_last_steps=0, dense_layers=0)
TURNS = dict(refresh=2, **SPARSE)
CACHE = dict(warmup_steps=1, last_steps=0)
RADIAL = dict(decay_factor=0.2, near="half", sink=False)
SPARSED, SOL = d.SparseD(density=0.5, **SPARSE), d.SolAttention(**SPARSE)

BESIDE = {
    **{name: of({"prompt_embeds": torch.ones(1, 6, 64)}) for name, of in METHODS.items() if name not in GUIDING[1:]},
    "radial, pooled": (d.RadialAttention(rest="pooled", **RADIAL, **SPARSE),),
    "radial, cached": (d.RadialAttention(rest="cached", **RADIAL, **TURNS),),
    "radial, refreshed": (d.RadialAttention(**RADIAL, **TURNS),),
    "radial, patches": (d.RadialAttention(order="tiles", rest="cached", rest_dtype="int8", **RADIAL, **TURNS),),
    "lvsa, cached": (d.LVSA(block_size=16, trained_frames=2, window=0, rest="cached", refresh=2),),
    "sparsed, pooled": (replace(SPARSED, rest="pooled"),),
    "sparsed, mass": (d.SparseD(mass=0.6, **SPARSE),),
    "sparsed, cached": (replace(SPARSED, rest="cached", refresh=2, rest_offload="cpu"),),
    "sol, cached": (replace(SOL, rest="cached", refresh=3),),
    "lite, votes": (d.LiteAttention(threshold=-1.0, dense_steps=0, block_size=16),),
    "lite, refreshed": (d.LiteAttention(threshold=-1.0, refresh_every=2, rest="pooled", dense_steps=0, block_size=16),),
    "lite, cached": (d.LiteAttention(threshold=-1.0, rest="cached", refresh=2, dense_steps=0, block_size=16),),
    "delta, reused": (d.DeltaAttention(stride=8, reuse=2), SPARSED),
    "delta, turns": (d.DeltaAttention(stride=8, reuse=3), replace(SPARSED, rest="cached", refresh=3)),
    "delta, lite": (d.DeltaAttention(stride=8), d.LiteAttention(threshold=-1.0, dense_steps=0, block_size=16)),
    "dfa, share": (d.DFA(share=0.3, strict=True),),
    "staticcache, held": (d.StaticCache(every=3, predictor="hold", stored="output", **CACHE),),
    "staticcache, heun": (d.StaticCache(every=2, predictor="heun", **CACHE),),
    "profilingcache": (d.ProfilingCache(blocks="0, 2", every=2, predictor="taylor", **CACHE),),
    "magcache, diffusers": (
        MagCacheConfig(threshold=10.0, max_skip_steps=1, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS),
    ),
    "taylor, diffusers": (
        TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, cache_identifiers=[r"blocks\.\d\.attn1"]),
    ),
    "staticcache, corrected": (d.StaticCache(every=2, predictor="corrected", **CACHE),),
}  # fmt: skip
"""Settings of every method and of every rest, turn and reuse that it may have."""


PACKED = ("StableDiffusion3Pipeline", "MochiPipeline", "HiDreamImagePipeline", "ZImagePipeline", "FluxPipeline")
"""Pipelines with both prompts in a forward, attention row by row, rows on other axes or in lists, joined text."""

ALIKE = (
    "radial", "radial, pooled", "radial, patches", "ultravico", "lvsa", "rope", "sparsed, pooled", "sparsed, mass",
    "lite, refreshed", "dfa, share", "teacache", "magcache", "seacache", "firstblockcache", "staticcache, held",
)  # fmt: skip
"""Those that keep nothing, or as others do: `make test` leaves them to the slow ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Twice(MethodConfig):
    """Runs the model again in a branch of its own, as it is, and leads away from that."""

    name = "twice"
    start: float = 0.0


class TwiceHandler(Handler):
    config_type = Twice
    phase = Phase.GUIDANCE
    places = frozenset({Place.FORWARD})

    def install(self, site):
        site.around_forward(lambda context, run: self.around(site, context, run))

    def around(self, site, context, run):
        out = run()
        if context.branch == "uncond" or context.step_index / STEPS < self.settings.start:
            return out
        with site.branch("twice"):
            return with_sample(out, sample_of(out) + 3 * (sample_of(out) - sample_of(run())))


NOTHING = {
    "softpag": d.SoftPAG(heads="L2H0", u=1e-12, scale=3.0),
    "softpag, whole branch": d.SoftPAG(heads="L2H0", u=1e-12, scale=3.0, share_prefix=False),
    "softpag, mean query": d.SoftPAG(heads="L0", u=1e-12, scale=3.0, target="mean-query"),
    "softpag, temperature": d.SoftPAG(heads="L1H1", u=1e-12, scale=3.0, target="temperature"),
    "seg": d.SEG(layers="L0, L2", sigma=1e-6, scale=3.0),
    "pag": d.PAG(layers="L1", scale=3.0),  # whose block adds nothing
    "slg": d.SLG(layers="L1", scale=3.0, start=0.0, stop=1.0),
    "autoguidance": d.AutoGuidance(scale=3.0),  # by a copy of the model
    "twice": Twice(),
}
"""Perturbations of nothing, none of which is left out for that."""

FREE = ("softpag", "seg", "softpag, temperature")
"""Those that are tried in place of the unconditional forward as well."""

REFUSED = (
    "the branches would mix", "both change what an attention call gave", "some are to be left out",
    "guidance would add what the cache is off by", "the last change of attention",
)  # fmt: skip
"""What is said of what does not go together: SLG and a cache of blocks, another target and NAG, UltraViCo and DFA, a
cache of diffusers and guidance that begins later, NAG and SoftPAG in the forward that is there anyway."""

ROUNDING = 1e-5
"""The least share of the latents' norm that counts: the model rounds to float32 inside."""


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(registry.handlers(), Twice.name, TwiceHandler)


def idle_transformer():
    """A model in float64 whose block 1 adds nothing, so that to perturb or to skip it changes nothing."""
    transformer = sharp_transformer().double()
    block = transformer.blocks[1]
    for layer in (block.attn1.to_out[0], block.attn2.to_out[0], block.ffn.net[-1]):
        layer.weight.data.zero_(), layer.bias.data.zero_()
    return transformer


TRANSFORMER = idle_transformer()


def denoise(together):
    """Return the latents of a run in which the prompt and its negative run in one forward or in two."""
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(1, 12, 5, 8, 8, generator=noise, dtype=torch.float64)
    texts = torch.randn(2, 6, 64, generator=noise, dtype=torch.float64)
    calls = {"cond_uncond": slice(0, 2)} if together else {"cond": slice(0, 1), "uncond": slice(1, 2)}
    with torch.no_grad():
        for step in range(STEPS):
            step_known, outs = dict(step_index=step, num_inference_steps=STEPS, sigma=1 - step / STEPS), []
            for branch, rows in calls.items():
                with TRANSFORMER.cache_context(branch, **step_known):
                    count = rows.stop - rows.start
                    time = torch.full((count,), 1000.0 - 150 * step)
                    outs.append(TRANSFORMER(x.expand(count, -1, -1, -1, -1), time, texts[rows], return_dict=False)[0])
            cond, uncond = torch.cat(outs)[[1, 0] if together else [0, 1]].chunk(2)
            x = x - 0.3 * (uncond + 2.0 * (cond - uncond))
    return x


def guidance(what, start, mode):
    if what == "autoguidance":
        return replace(NOTHING[what], weak_transformer=copy.deepcopy(TRANSFORMER), start=start)
    return replace(NOTHING[what], start=start, **({"scale": None, "mode": mode} if mode == "free" else {}))


def run(methods, together):
    with d.attach(TRANSFORMER, *methods, preset="none", backend="torch") if methods else contextlib.nullcontext():
        return denoise(together)


CASES = [
    (what, start, together, mode)
    for mode, tried in (("branch", NOTHING), ("free", FREE)) for what in tried
    for start in (0.0, 0.3) for together in (False, True)
]  # fmt: skip
"""What is perturbed, from which share of the run on, whether both prompts are in one forward, and in which mode."""

QUICK = [case for case in CASES if case[1]]
"""Cases of which `make test` tries one beside each method, in turn: what began earlier knows more than the branch."""


def require_nothing_added(beside, cases):
    """Require that no case moves a run of some methods beside which nothing is perturbed."""
    wrong, alone = [], {}
    for what, start, together, mode in cases:
        try:
            if together not in alone:
                alone[together] = run(beside, together)
            guided = run((*beside, guidance(what, start, mode)), together)
        except ConfigError as error:
            if not any(reason in str(error) for reason in REFUSED):
                raise
            continue
        moved = float((guided - alone[together]).norm() / alone[together].norm())
        if not moved < ROUNDING:
            wrong.append(f"{what} {mode} from {start}, {'one call' if together else 'two calls'}: {moved:.2g}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", some(BESIDE, *[name for name in BESIDE if name not in ALIKE]))
def test_nothing_is_added_beside_a_method(name):
    require_nothing_added(BESIDE[name], [QUICK[5 * list(BESIDE).index(name) % len(QUICK)]])


@pytest.mark.slow
@pytest.mark.rare
@pytest.mark.parametrize("name", BESIDE)
def test_nothing_is_added_beside_a_method_by_anything(name):
    require_nothing_added(BESIDE[name], CASES)


@pytest.mark.slow
@pytest.mark.parametrize("name", BESIDE)
def test_nothing_is_added_beside_a_method_by_each_guidance(name):
    """Each in one of its cases, another beside every method."""
    turn, kinds = list(BESIDE).index(name), {}
    for case in CASES:
        kinds.setdefault((case[0], case[3]), []).append(case)
    require_nothing_added(BESIDE[name], [cases[turn % len(cases)] for cases in kinds.values()])


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_added_beside_a_pair(name):
    names = [one for one in METHODS if one in BESIDE]
    for other in names[names.index(name) + 1 :] if name in names else ():
        pair = {type(one): one for one in (*BESIDE[name], *BESIDE[other])}
        try:
            d.attach(TRANSFORMER, *pair.values(), preset="none").detach()
        except ConfigError:
            continue  # they are refused together
        turn = (names.index(name) + names.index(other)) % 2
        case = ("seg", 0.3, bool(turn), "branch") if turn else ("softpag", 0.3, True, "branch")
        require_nothing_added(tuple(pair.values()), [case])


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKED)
def test_nothing_is_added_in_pipelines_that_lay_out_their_rows_otherwise(name):
    plain, nothing, found = plain_of(name), d.SoftPAG(heads="L1H0", u=1e-7, scale=3.0, start=0.3), []
    for beside in ("lite", "sparsed, cached", "delta, turns", "staticcache", "dbcache", "nag, lite"):
        methods = BESIDE[beside] if beside in BESIDE else (*METHODS["nag"](plain.call), *BESIDE["lite"])
        made = []
        with contextlib.suppress(ConfigError):  # some can't have a negative text
            for all_of in (methods, (*methods, nothing)):
                with d.attach(plain.pipe, *all_of, preset="none", backend="torch"):
                    made.append(matrix_runs.run(plain.pipe, plain.call))
            moved = float((made[1] - made[0]).norm() / made[0].norm())
            found += [] if moved < ROUNDING else [f"{beside}: {moved:.2g}"]
        assert made or beside == "nag, lite"
    assert not found, "\n".join(found)


KEEPING = ("sparsed, cached", "lite, cached", "delta, turns", "ultraimage", "dbcache")
"""Of every kind of what is kept one: their branches are compared in `make test`."""


@pytest.mark.parametrize("name", some(BESIDE, *KEEPING))
def test_a_branch_from_its_first_perturbed_block_is_the_whole_branch(name):
    start = 0.0 if "diffusers" in name else 0.3  # with which those caches begin later is refused
    real = d.SoftPAG(heads="L2H0", u=0.7, scale=3.0, start=start)
    made = [run((*BESIDE[name], replace(real, share_prefix=share)), together=True) for share in (True, False)]
    assert torch.equal(*made)


@pytest.mark.parametrize("name", ["lite, cached", "delta, reused", "dfa", "ultraimage"])
def test_a_branch_beside_another_holds_nothing(name):
    held = []
    for methods in (BESIDE[name], (*BESIDE[name], replace(NOTHING["softpag"], share_prefix=False))):
        with d.attach(TRANSFORMER, *methods, preset="none", backend="torch") as attachment:
            denoise(together=False)
            held.append(
                {method: size for method, size in attachment.report().state_bytes.items() if method != "softpag"}
            )
            states = {layer.state for layer in attachment.engine.layers}
            assert not any(state.ran or state.made._calls for state in states), "a call that is over is held"
    assert held[0]
    assert held[0] == held[1]


def test_the_public_check_finds_a_forward_that_keeps_state_of_its_own(monkeypatch):
    model = Case(adapter_for("WanTransformer3DModel"), tiny_wan())
    check_beside_guidance(model, METHOD_CASES["lite"])
    monkeypatch.setattr(CallsMade, "find", lambda *_: None)
    with pytest.raises(AssertionError, match="LiteAttention"):
        check_beside_guidance(model, METHOD_CASES["lite"])
