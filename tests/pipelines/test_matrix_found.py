"""What trials from outside found wrong without a word, each as a case of the matrix or as a test of its own."""

import contextlib
from collections.abc import Iterator

import matrix_situations
import pytest
import torch
from matrix_cases import wrong_in
from matrix_runs import run
from tiny_stock import stock_pipeline
from wan_tiny import tiny_transformer

from dit_accel import PAG, EasyCache, RadialAttention, StaticCache, attach, attachment_of
from dit_accel.errors import DitAccelError

TYPES = (torch.float32, torch.float64)
EQUAL, OTHER, ONE = "two prompts, equal seeds", "two prompts, other seeds", "one prompt"

FOUND = {
    "rows taken for a negative prompt": [
        *((f"Flux{kind}Pipeline", "pag", EQUAL) for kind in ("Img2Img", "Inpaint", "Kontext", "Fill", "Control")),
        ("Flux2Pipeline", "softpag", EQUAL),
        ("Flux2Pipeline", "nag", EQUAL),
        ("WanVideoToVideoPipeline", "nag", EQUAL),
        ("ChromaPipeline", "pag", EQUAL),
        ("Lumina2Pipeline", "slg", EQUAL),
        ("Lumina2Pipeline", "nag", EQUAL),
    ],
    "another pipeline's steps": [
        ("FluxPipeline", "staticcache", "another pipeline"),
        ("StableDiffusion3Pipeline", "lite", "another pipeline"),
    ],
    "inputs whose batch is not their first axis": [
        ("HiDreamImagePipeline", "pag", ONE),
        ("HiDreamImagePipeline", "softpag", ONE),
        ("HiDreamImagePipeline", "slg", EQUAL),
        ("HiDreamImagePipeline", "slg", "another guidance scale"),
    ],
    "a transformer for each prompt": [
        ("Ideogram4Pipeline", "pag", "another guidance scale"),
        ("Ideogram4Pipeline", "softpag", EQUAL),
        ("Ideogram4Pipeline", "staticcache", ONE),
    ],
    "latents written in place": [
        ("Kandinsky5T2VPipeline", "easycache", ONE),
        ("FluxPipeline", "easycache", "latents in place"),
    ],
    "a run that raised, on a bare transformer": [
        ("StableDiffusion3Pipeline", "easycache", "bare transformer, after an exception"),
        ("FluxKontextPipeline", "easycache", "bare transformer, after an exception"),
    ],
    "a foreground of all rows together": [
        *((name, "dfa", OTHER) for name in ("LTXPipeline", "WanPipeline", "HunyuanVideoPipeline", "MochiPipeline"))
    ],
    "text with a further axis": [("AllegroPipeline", "nag", ONE), ("AllegroPipeline", "nag", EQUAL)],
    "lists that the model takes entries out of, and lists of lists": [
        ("HunyuanDiTControlNetPipeline", "pag", ONE),
        ("ZImageOmniPipeline", "easycache", ONE),
    ],
    "latents of another shape": [("Flux2KleinKVPipeline", "easycache", ONE), ("QwenImage21Pipeline", "easycache", ONE)],
    "guidance that a callback ends": [("StableDiffusion3Pipeline", "easycache", "guidance ends midway")],
    "one text for several images": [
        ("FluxPipeline", "nag", "two of one prompt"),
        ("FluxKontextPipeline", "nag", "two of one prompt"),
    ],
}
"""What was wrong -> the cases of the matrix in which it was."""


@pytest.mark.parametrize("what", FOUND)
@pytest.mark.parametrize("part", ["first two", pytest.param("others", marks=pytest.mark.slow)])
def test_what_was_found_is_a_case_of_the_matrix_and_right(what, part):
    cases = FOUND[what][:2] if part == "first two" else FOUND[what][2:]
    wrong = [f"{name}: {line}" for name, method, one in cases for line in wrong_in(name, [(method, one)])]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("shift", "types"), [(3e-5, {torch.float32}), (3e-5, set(TYPES))])
def test_what_may_be_a_processors_rounding_is_judged_in_float64(monkeypatch, shift, types):
    real = matrix_situations.run_rows

    def rounded(plain, prompts, seeds, how=""):
        made, ours = real(plain, prompts, seeds, how), attachment_of(plain.pipe) is not None
        return made + shift * made.abs().max() * (ours and len(prompts) > 1 and made.dtype in types)

    monkeypatch.setattr(matrix_situations, "run_rows", rounded)
    monkeypatch.setattr(matrix_situations, "SPREAD", 0.0)  # on some processors a plain batch is its rows to the bit
    found = wrong_in("HunyuanDiTControlNetPipeline", [("slg", EQUAL)])
    assert bool(found) == (len(types) > 1)


@contextlib.contextmanager
def attached(model: object, *methods: object) -> Iterator[object]:
    with attach(model, *methods, preset="none", backend="torch") as attachment:
        yield attachment


def _inputs(spread):
    """Latents, and the text of each prompt."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 12, 5, 8, 8, generator=generator)
    return latents, {name: spread * torch.randn(1, 6, 64, generator=generator) for name in ("cond", "uncond")}


def _guided(transformer, order, contexts):
    """One step of a loop written by hand, guided by 5."""
    latents, texts = _inputs(1)
    out = {}
    with torch.no_grad():
        for name in order:
            with transformer.cache_context(name) if contexts else contextlib.nullcontext():
                out[name] = transformer(latents, torch.tensor([900.0]), texts[name], return_dict=False)[0]
    return out["uncond"] + 5 * (out["cond"] - out["uncond"])


ORDERS = [("cond", "uncond"), ("uncond", "cond")]


@pytest.mark.parametrize("contexts", [True, False])
def test_a_loop_that_begins_with_the_negative_prompt_is_guided_as_the_other_way_round_or_refused(contexts):
    transformer = tiny_transformer()
    plain = _guided(transformer, ORDERS[0], contexts)
    added = []
    for order in ORDERS:
        with attached(transformer, PAG(layers="L1", scale=3.0)), contextlib.suppress(DitAccelError):
            added.append(_guided(transformer, order, contexts) - plain)
    assert bool(added) is contexts
    if len(added) == 2:
        torch.testing.assert_close(*added, rtol=1e-3, atol=1e-4 * float(added[0].abs().max()))


@pytest.mark.parametrize("share", [0.07, 0.28, 0.55])
def test_a_share_of_the_steps_is_as_many_for_attention_as_for_caches(share):
    radial = RadialAttention(dense_steps=share, dense_last_steps=0, dense_layers=0).filled()
    for steps in (25, 50, 100):
        dense = sum(radial.is_dense(index, steps, 0, 0.5) for index in range(steps))
        assert dense == EasyCache(warmup_steps=share).first_steps(steps)


@pytest.mark.parametrize("order", ORDERS)
def test_guidance_that_ends_leaves_a_cache_no_history_of_the_other_prompt(order):
    """The first step with the prompt alone is not forecast from the negative prompt's output."""
    transformer = tiny_transformer()

    def loop(*methods):
        latents, texts = _inputs(3)
        outs = []
        with attached(transformer, *methods), torch.no_grad():
            for step in range(6):
                time = torch.tensor([1000.0 - 100 * step])
                names = order if step < 5 else ("cond",)
                outs.append({name: transformer(latents, time, texts[name], return_dict=False)[0] for name in names})
                latents = latents - 0.02 * sum(outs[-1].values()) / len(names)
        return outs

    plain, cached = loop(), loop(StaticCache(every=6, warmup_steps=1, last_steps=0))
    off = [float((cached[5]["cond"] - one).norm()) for one in (plain[5]["cond"], plain[0]["uncond"])]
    assert off[0] < off[1]


CONVERTED = {
    "ZImageModularPipeline": lambda added, sigma: -added,
    "QwenImage21ModularPipeline": lambda added, sigma: added,
    "LTX2ModularPipeline": lambda added, sigma: -sigma * added,
}
"""Modular pipelines that change predictions before their guider mixes them -> what becomes of what is added to them."""


def first_step(name, **method):
    """Run a modular pipeline; return its transformer's predictions and its guider's result in the first step."""
    pipe, call = stock_pipeline(name)
    given, mixed, sigmas = [], [], []
    forward = pipe.guider.forward

    def guided(*args, **kwargs):
        out = forward(*args, **kwargs)
        mixed.append(out.pred.clone())
        sigmas.append(float(pipe.scheduler.sigmas[0]))
        return out

    pipe.guider.forward = guided
    pipe.transformer.register_forward_hook(lambda module, args, out: given.append(out[0]))
    with attach(pipe, PAG(layers="L1", scale=2.0, **method)) if method else contextlib.nullcontext():
        run(pipe, call)
    return given, mixed[0], sigmas[0]


@pytest.mark.parametrize("name", CONVERTED)
def test_what_is_added_before_a_guider_is_changed_as_the_predictions_are(name):
    _, plain, _ = first_step(name)
    given, guided, sigma = first_step(name, share_prefix=False)
    cond, perturbed = (torch.stack(list(one)).squeeze(2) if isinstance(one, list) else one for one in given[:2])
    added = 2.0 * (cond - perturbed)[:, -plain.shape[1] :] if plain.ndim == 3 else 2.0 * (cond - perturbed)
    expected = CONVERTED[name](added, sigma)
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(guided - plain, expected, rtol=1e-3, atol=1e-5)


def test_a_pipeline_that_changes_predictions_before_its_guider_is_refused_if_undeclared(monkeypatch):
    from dit_accel_pipelines.families.z_image import Z_IMAGE

    monkeypatch.setattr(type(Z_IMAGE.guidance), "converted", (), raising=False)
    pipe, call = stock_pipeline("ZImageModularPipeline")
    with attach(pipe, PAG(layers="L1")), pytest.raises(DitAccelError, match=r"pag.*guider mixes"):
        run(pipe, call)
