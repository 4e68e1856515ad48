"""What trials from outside found wrong without a word, each as a case of the matrix or as a test of its own."""

import contextlib
import copy
import threading
import warnings
from collections.abc import Iterator

import diffusers
import matrix_situations
import pytest
import torch
from matrix_cases import plain_of, wrong_in
from matrix_runs import run
from tiny_parts import picture
from tiny_stock import stock_pipeline
from wan_tiny import sharp_transformer, tiny_transformer

from dit_accel import (
    PAG,
    SLG,
    EasyCache,
    FirstBlockCache,
    LiteAttention,
    RadialAttention,
    SolAttention,
    StaticCache,
    attach,
    attachment_of,
)
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
    "a foreground of all rows together": [("LTXPipeline", "dfa", OTHER), ("WanPipeline", "dfa", OTHER)],
    "latents of another shape": [("Flux2KleinKVPipeline", "easycache", ONE), ("QwenImage21Pipeline", "easycache", ONE)],
    "guidance that a callback ends": [("StableDiffusion3Pipeline", "easycache", "guidance ends midway")],
    "one text for several images": [
        ("FluxPipeline", "nag", "two of one prompt"),
        ("FluxKontextPipeline", "nag", "two of one prompt"),
    ],
}
"""What was wrong -> the cases of the matrix in which it was."""


@pytest.mark.parametrize("what", FOUND)
def test_what_was_found_is_a_case_of_the_matrix_and_right(what):
    wrong = [f"{name}: {line}" for name, method, one in FOUND[what] for line in wrong_in(name, [(method, one)])]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("shift", "types"), [(3e-5, {torch.float32}), (3e-3, {torch.float32}), (3e-5, set(TYPES))])
def test_what_may_be_a_processors_rounding_is_judged_in_float64(monkeypatch, shift, types):
    real = matrix_situations.run_rows

    def rounded(plain, prompts, seeds, how=""):
        made, ours = real(plain, prompts, seeds, how), attachment_of(plain.pipe) is not None
        return made + shift * made.abs().max() * (ours and len(prompts) > 1 and made.dtype in types)

    monkeypatch.setattr(matrix_situations, "run_rows", rounded)
    monkeypatch.setattr(matrix_situations, "SPREAD", 0.0)  # on some processors a plain batch is its rows to the bit
    found = wrong_in("HunyuanDiTControlNetPipeline", [("slg", EQUAL)])
    assert bool(found) == (shift > 1e-3 or len(types) > 1)


@contextlib.contextmanager
def attached(model: object, *methods: object) -> Iterator[object]:
    with attach(model, *methods, preset="none", backend="torch") as attachment:
        yield attachment


def flux() -> tuple[object, dict]:
    plain = plain_of("FluxPipeline")
    return plain.pipe, plain.call


def test_steps_are_those_of_the_class_that_runs():
    pipe, call = flux()
    other = diffusers.FluxImg2ImgPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    edited = {**call, "num_inference_steps": 12, "image": picture(), "strength": 1.0}
    every_third = StaticCache(every=3, warmup_steps=1, last_steps=1)
    with attached(other, every_third) as attachment:
        fresh = run(other, edited)
        told = attachment.report().section("staticcache").title
    with attached(pipe, every_third) as attachment:
        run(pipe, call)
        assert torch.equal(run(other, edited), fresh)
        assert attachment.report().section("staticcache").title == told


def test_a_run_of_one_step_after_another_is_the_first_where_prompts_have_their_own_transformers():
    plain = plain_of("Ideogram4Pipeline")
    call = {**plain.call, "num_inference_steps": 1}
    for method in (PAG(layers="L1", scale=2.0), SLG(layers="L1", scale=2.0, start=0.0, stop=1.0)):
        with attached(plain.pipe, method):
            assert torch.equal(run(plain.pipe, call), run(plain.pipe, call))


def _guided(transformer: torch.nn.Module, order: tuple[str, str], contexts: bool) -> torch.Tensor:
    """One step of a loop written by hand, guided by 5."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 12, 5, 8, 8, generator=generator)
    texts = {name: torch.randn(1, 6, 64, generator=generator) for name in ("cond", "uncond")}
    out = {}
    with torch.no_grad():
        for name in order:
            with transformer.cache_context(name) if contexts else contextlib.nullcontext():
                out[name] = transformer(latents, torch.tensor([900.0]), texts[name], return_dict=False)[0]
    return out["uncond"] + 5 * (out["cond"] - out["uncond"])


@pytest.mark.parametrize("contexts", [True, False])
def test_a_loop_that_begins_with_the_negative_prompt_is_guided_as_the_other_way_round_or_refused(contexts):
    transformer = tiny_transformer()
    plain = _guided(transformer, ("cond", "uncond"), contexts)
    added = []
    for order in (("cond", "uncond"), ("uncond", "cond")):
        with attached(transformer, PAG(layers="L1", scale=3.0)):
            try:
                added.append(_guided(transformer, order, contexts) - plain)
            except DitAccelError:
                added.append(None)
    right, other = added
    assert contexts is (right is not None)
    assert other is None or right is not None
    if right is not None and other is not None:
        assert torch.allclose(right, other, rtol=1e-3, atol=1e-4 * float(right.abs().max()))


@pytest.mark.parametrize("share", [0.07, 0.14, 0.28, 0.55, 0.56])
@pytest.mark.parametrize("steps", [25, 50, 100])
def test_a_share_of_the_steps_is_as_many_for_attention_as_for_caches(share, steps):
    radial = RadialAttention(dense_steps=share, dense_last_steps=0, dense_layers=0).filled()
    dense = sum(radial.is_dense(index, steps, 0, 0.5) for index in range(steps))
    assert dense == EasyCache(warmup_steps=share).first_steps(steps)


@pytest.mark.parametrize(
    "method",
    [FirstBlockCache(threshold=5.0, warmup_steps=1), SLG(layers="L1", scale=2.0, start=0.0, stop=1.0)],
    ids=lambda method: method.name,
)
def test_a_transformer_compiled_after_attach_is_followed_or_said(method):
    pipe, call = stock_pipeline("WanPipeline")
    pipe.set_progress_bar_config(disable=True)
    call = {**call, "output_type": "latent"}
    with attached(pipe, method):
        right = run(pipe, call)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with attached(pipe, method):
                pipe.transformer = torch.compile(pipe.transformer, backend="eager")
                made = run(pipe, call)
        except DitAccelError:
            return
    torch._dynamo.reset()
    said = [one for one in caught if "compile" in str(one.message) or "attach" in str(one.message)]
    assert said or torch.allclose(made, right, atol=1e-4)


def test_a_transformer_replaced_while_attached_is_said():
    pipe, call = stock_pipeline("WanPipeline")
    pipe.set_progress_bar_config(disable=True)
    call = {**call, "output_type": "latent"}
    sparse = RadialAttention(
        decay_factor=0.2, near="half", sink=False, block_size=16, dense_steps=1, dense_layers=0, dense_last_steps=0
    )
    with attached(pipe, sparse) as attachment:
        run(pipe, call)
        assert not any("replaced" in note for note in attachment.report().notes)
        pipe.transformer = sharp_transformer(7)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                run(pipe, call)
            except DitAccelError:
                return
        said = [str(one.message) for one in caught if "attach" in str(one.message)]
        assert said or any("was replaced after attach" in note for note in attachment.report().notes)


@pytest.mark.parametrize(
    "method",
    [PAG(layers="L1", scale=3.0), SolAttention(block_size=16, dense_steps=1, dense_layers=0, dense_last_steps=0),
     LiteAttention(target_density=0.5, dense_steps=1, block_size=16)],
    ids=lambda method: method.name,
)  # fmt: skip
def test_two_threads_around_one_attached_transformer_are_right_or_refused(method):
    pipe, call = stock_pipeline("WanPipeline")
    pipe.set_progress_bar_config(disable=True)
    other = copy.copy(pipe)
    other.scheduler = copy.deepcopy(pipe.scheduler)
    call = {**call, "output_type": "latent", "num_inference_steps": 6}
    made: dict[int, object] = {}

    def thread(seed: int, one: object) -> None:
        try:
            torch.set_num_threads(1)
            made[seed] = one(**call, generator=torch.Generator().manual_seed(seed)).frames
        except DitAccelError as error:
            made[seed] = error

    with attached(pipe, method):
        right = {
            seed: one(**call, generator=torch.Generator().manual_seed(seed)).frames
            for seed, one in ((0, pipe), (1, other))
        }
        threads = [threading.Thread(target=thread, args=pair) for pair in ((0, pipe), (1, other))]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    for seed, one in made.items():
        assert "thread" in str(one) if isinstance(one, DitAccelError) else torch.allclose(one, right[seed], atol=1e-5)


@pytest.mark.parametrize("order", [("cond", "uncond"), ("uncond", "cond")])
def test_guidance_that_ends_leaves_a_cache_no_history_of_the_other_prompt(order):
    """The first step with the prompt alone is not forecast from the negative prompt's output."""
    transformer = tiny_transformer()

    def loop(*methods: object, stop: int = 5) -> list[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(1, 12, 5, 8, 8, generator=generator)
        texts = {name: 3 * torch.randn(1, 6, 64, generator=generator) for name in ("uncond", "cond")}
        outs = []
        with attached(transformer, *methods), torch.no_grad():
            for step in range(8):
                time = torch.tensor([1000.0 - 100 * step])
                names = order if step < stop else ("cond",)
                got = {name: transformer(latents, time, texts[name], return_dict=False)[0] for name in names}
                outs.append(got)
                latents = latents - 0.02 * sum(got.values()) / len(got)
        return outs

    plain, cached = loop(), loop(StaticCache(every=6, warmup_steps=1, last_steps=0))
    off = [float((cached[5]["cond"] - one).norm()) for one in (plain[5]["cond"], plain[0]["uncond"])]
    assert off[0] < off[1]


@pytest.mark.parametrize(
    ("name", "method"), [("HunyuanDiTControlNetPipeline", "pag"), ("ZImageOmniPipeline", "easycache")]
)
def test_inputs_that_are_lists_are_whole_in_each_forward_and_may_hold_lists(name, method):
    """HunyuanDiT takes entries out of the list of residuals it is given; Z-Image Omni's latents are lists of lists."""
    assert wrong_in(name, [(method, "one prompt")]) == []


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
