"""NAG in stock pipelines agrees with its formula, in cross-attention and where text joins; what it refuses."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import diffusers
import dit_accel_assets
import pytest
import torch
import wan_tiny
from tiny_stock import run_stock, stock_pipeline
from torch import Tensor
from typer.testing import CliRunner

import dit_accel
from dit_accel import NAG, ConfigError
from dit_accel.cli.app import app


class Meeting:
    """Where two threads, one of the prompt and one of the negative text alone, exchange what attention gave."""

    def __init__(self, picture: int, before: bool, scale: float, tau: float, alpha: float) -> None:
        self.picture, self.before = picture, before
        self.scale, self.tau, self.alpha = scale, tau, alpha
        self.met = 0
        self._barrier = threading.Barrier(2, timeout=60)
        self._given: list[Any] = [None, None]
        self._dense = torch.nn.functional.scaled_dot_product_attention

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
        out = self._dense(query, key, value, *rest, **options)
        side = getattr(threading.current_thread(), "side", None)
        if side is None or query.shape[2] <= self.picture:  # the picture alone, or text alone
            return out
        text = query.shape[2] - self.picture
        rows = slice(text, None) if self.before else slice(0, self.picture)
        self._given[side] = out[:, :, rows]
        self._barrier.wait()
        positive, negative = self._given
        self._barrier.wait()
        self.met += 1
        led = self.scale * positive - (self.scale - 1) * negative
        length = {name: x.abs().sum((1, 3), keepdim=True) for name, x in (("led", led), ("plain", positive))}
        ratio = length["led"] / length["plain"]
        led = torch.where(ratio > self.tau, led * self.tau / ratio, led)
        out = out.clone()
        out[:, :, rows] = self.alpha * led + (1 - self.alpha) * positive
        return out

    def run(self, forwards: tuple[Callable[[], Tensor], Callable[[], Tensor]]) -> Tensor:
        """Return what the first of two forwards gives, which run together."""
        made: list[Any] = [None, None]

        def work(side: int) -> None:
            threading.current_thread().side = side
            try:
                with torch.no_grad():
                    made[side] = forwards[side]()
            except BaseException as error:
                made[side] = error
                self._barrier.abort()

        threads = [threading.Thread(target=work, args=(side,)) for side in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for one in made:
            if isinstance(one, BaseException):
                raise one
        return made[0]


@contextlib.contextmanager
def negative_pairs(
    transformer: Any, embeds: Tensor, meeting: Meeting, *, mask: str | None, conditional: Callable[[int], slice | None]
) -> Iterator[None]:
    """Let a transformer's conditional forwards be NAG's formula.

    Args:
        transformer: the transformer, with nothing attached.
        embeds: the negative text, [1, tokens, C], all of it valid.
        meeting: how far it leads, and where the picture stands.
        mask: name of the input that tells valid text.
        conditional: number of the forward -> its conditional rows, the last ones; None: it has none.
    """
    plain, count = transformer.forward, [0]

    def forward(**inputs: Any) -> Any:
        rows, count[0] = conditional(count[0]), count[0] + 1
        if rows is None:
            return plain(**inputs)
        batch = len(inputs["hidden_states"])
        own = {
            name: value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == batch else value
            for name, value in inputs.items()
        }
        away = {**own, "encoder_hidden_states": embeds}
        if mask is not None:
            away[mask] = torch.ones(embeds.shape[:2], dtype=torch.bool)
        led = meeting.run(tuple(lambda one=one: plain(**one)[0] for one in (own, away)))
        if rows.start == 0:
            return (led,)
        return (torch.cat([plain(**inputs)[0][: rows.start], led]),)

    with (
        mock.patch.object(transformer, "forward", forward),
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", meeting.attend),
    ):
        yield


NEGATIVE = "blurry, low quality"


def attended(attention, hidden, text):
    """The output of a Wan cross-attention before its projection, written down."""
    q, k, v = attention.to_q(hidden), attention.to_k(text), attention.to_v(text)
    q, k = attention.norm_q(q), attention.norm_k(k)
    q, k, v = (x.unflatten(2, (attention.heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2, 3)


@contextlib.contextmanager
def formula(transformer, embeds, scale, tau, alpha, guided):
    """Let a Wan transformer's cross-attention be NAG's formula in the calls that ``guided()`` tells."""
    with contextlib.ExitStack() as stack:
        for block in transformer.blocks:
            plain = block.attn2.forward

            def forward(hidden, text, *rest, attention=block.attn2, plain=plain):
                if not guided():
                    return plain(hidden, text, *rest)
                negative = transformer.condition_embedder.text_embedder(embeds)
                positive, away = attended(attention, hidden, text), attended(attention, hidden, negative)
                led = scale * positive - (scale - 1) * away
                ratio = led.abs().sum(-1, keepdim=True) / positive.abs().sum(-1, keepdim=True)
                led = torch.where(ratio > tau, led * tau / ratio, led)
                return attention.to_out[0](alpha * led + (1 - alpha) * positive)

            stack.enter_context(mock.patch.object(block.attn2, "forward", forward))
        yield


def embeds_of(pipe, text=NEGATIVE, length=512):
    with torch.no_grad():
        return pipe.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=length)[0]


def require_formula(made, expected, plain):
    assert float((expected - plain).norm() / plain.norm()) > 1e-4
    assert float((made - expected).norm() / expected.norm()) <= 1e-5


@pytest.mark.parametrize(("guidance", "tau"), [(1.0, 1.02), (3.0, 2.5)])
def test_wan_is_the_formula_in_the_conditional_call_alone(make_pipe, guidance, tau):
    pipe = make_pipe()
    run = dict(guidance_scale=guidance, max_sequence_length=512)
    plain = wan_tiny.generate(pipe, **run)
    calls = []

    def conditional():
        calls.append(None)
        number = (len(calls) - 1) // len(pipe.transformer.blocks)
        return guidance == 1.0 or number % 2 == 0

    with formula(pipe.transformer, embeds_of(pipe), 8.0, tau, 0.5, conditional):
        expected = wan_tiny.generate(pipe, **run)
    method = NAG(scale=8.0, tau=tau, alpha=0.5, negative_prompt=NEGATIVE)
    with dit_accel.attach(pipe, method) as attachment:
        made = wan_tiny.generate(pipe, **run)
        data, forwards = attachment.report().section("nag").data, attachment.engine.recorder.forwards_run
    require_formula(made, expected, plain)
    assert data == {"steps": [0, 1, 2, 3], "branches": ["cond"], "forwards": 4, "calls": 12}
    assert forwards == (4 if guidance == 1.0 else 8)


def test_a_prompt_is_encoded_as_the_pipeline_encodes_its_own(make_pipe):
    pipe = make_pipe()
    with dit_accel.attach(pipe, NAG(scale=8.0, negative_prompt=NEGATIVE)):
        by_prompt = wan_tiny.generate(pipe, guidance_scale=1.0)
    with dit_accel.attach(pipe, NAG(scale=8.0, negative_embeds=embeds_of(pipe))):
        by_embeds = wan_tiny.generate(pipe, guidance_scale=1.0)
    assert torch.equal(by_prompt, by_embeds)
    pipe.text_encoder = None
    with pytest.raises(ConfigError, match=r"WanPipeline.*nag\.negative_prompt = 'blurry, low quality'"):
        dit_accel.attach(pipe, NAG(negative_prompt=NEGATIVE))
    assert dit_accel.attachment_of(pipe) is None


@pytest.mark.parametrize("name", ["LTXPipeline", "PixArtSigmaPipeline"])
def test_guidance_in_one_call_guides_the_conditional_rows_alone(name):
    """The negative text as the prompt itself moves nothing, so that padded text and rows are told rightly."""
    pipe, call = stock_pipeline(name)
    plain = run_stock(pipe, call)
    valid = call["prompt_attention_mask"][0].bool()
    prompt = call["prompt_embeds"][:, valid]
    with dit_accel.attach(pipe, NAG(negative_embeds=prompt)) as attachment:
        torch.testing.assert_close(run_stock(pipe, call), plain, rtol=1e-3, atol=1e-3)
        assert attachment.report().section("nag").data["forwards"] > 0
    with dit_accel.attach(pipe, NAG(negative_embeds=prompt.flip(-1), scale=11.0)):
        assert not torch.allclose(run_stock(pipe, call), plain, rtol=1e-2, atol=1e-2)
    assert torch.equal(run_stock(pipe, call), plain)


def test_a_plan_says_what_it_costs():
    for family, words in (
        ("wan2.1-1.3b", "nag computes the cross-attention of the conditional forward twice in 50 steps"),
        ("flux.1-dev", "nag runs the conditional forward for two texts in 28 steps, as dear as a forward more in each"),
        ("mochi-1", "on mochi it can't: its processor attends row by row"),
    ):
        result = CliRunner().invoke(app, ["plan", "--family", family, "--nag"])
        assert words in " ".join((result.stdout + result.stderr).split())
        assert (result.exit_code == 0) == (family != "mochi-1")


TWO_CALLS = dict(negative_prompt_embeds=torch.ones(1, 6, 16), negative_pooled_prompt_embeds=torch.ones(1, 8))
ALL, LAST = slice(0, 1), slice(1, 2)
HUNYUAN, QWEN = "encoder_attention_mask", "encoder_hidden_states_mask"


def every(number):
    return ALL


def first(number):
    return None if number % 2 else ALL


def last(number):
    return LAST


CASES = {
    "flux, guidance embedded": ("FluxPipeline", {}, "before", None, every),
    "flux, two calls": ("FluxPipeline", dict(true_cfg_scale=2.0, **TWO_CALLS), "before", None, first),
    "flux kontext, a reference": ("FluxKontextPipeline", {}, "before", None, every),
    "sd3, one call": ("StableDiffusion3Pipeline", dict(guidance_scale=3.0), "after", None, last),
    "sd3, guidance off": ("StableDiffusion3Pipeline", dict(guidance_scale=1.0), "after", None, every),
    "hunyuan-video, two calls": ("HunyuanVideoPipeline", {}, "after", HUNYUAN, first),
    "hunyuan-video, embedded": ("HunyuanVideoPipeline", dict(true_cfg_scale=1.0), "after", HUNYUAN, every),
    "qwen-image, two calls": ("QwenImagePipeline", {}, "before", QWEN, first),
    "qwen-image, guidance off": ("QwenImagePipeline", dict(true_cfg_scale=1.0), "before", QWEN, every),
    "cogvideox, one call": ("CogVideoXPipeline", {}, "before", None, last),
}
"""Pipeline, arguments, where text lies, its mask, and which rows of the forward of a number hold the prompt."""


def text_of(tokens):
    return torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(7))


def picture_of(pipe, place, call, changes):
    """The tokens of its pictures, as attention has them besides text."""
    with dit_accel.attach(pipe, NAG(negative_embeds=text_of(6))) as attachment:
        layouts = []
        attachment.engine.observers.append(lambda one: layouts.append((one.context.layout, one.call.tokens)))
        run_stock(pipe, call, **changes)
    layout, tokens = max(layouts, key=lambda one: one[1])
    return tokens - (layout.text_before if place == "before" else layout.text_after)


@pytest.mark.sample
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tau", [1.02, 2.5])
def test_stock_pipelines_are_the_formula(case, tau):
    name, changes, place, mask, conditional = CASES[case]
    pipe, call = stock_pipeline(name)
    plain = run_stock(pipe, call, **changes)
    embeds = text_of(6 if mask is None else 4)  # a mask tells texts of another length
    meeting = Meeting(picture_of(pipe, place, call, changes), place == "before", 8.0, tau, 0.5)
    with negative_pairs(pipe.transformer, embeds, meeting, mask=mask, conditional=conditional):
        expected = run_stock(pipe, call, **changes)
    with dit_accel.attach(pipe, NAG(scale=8.0, tau=tau, alpha=0.5, negative_embeds=embeds)) as attachment:
        require_formula(run_stock(pipe, call, **changes), expected, plain)
        assert 2 * attachment.report().section("nag").data["calls"] == meeting.met > 0


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "HunyuanVideoPipeline"])
def test_neutral_settings_change_no_bit(name):
    pipe, call = stock_pipeline(name)
    plain = run_stock(pipe, call)
    with dit_accel.attach(pipe, NAG(negative_embeds=text_of(6), scale=1.0)):
        assert torch.equal(run_stock(pipe, call), plain)


@pytest.mark.slow
def test_compiled_blocks_are_guided_as_well():
    pipe, call = stock_pipeline("FluxPipeline")
    nag = NAG(scale=8.0, stop=0.5, negative_embeds=text_of(6))
    with dit_accel.attach(pipe, nag):
        expected = run_stock(pipe, call)
    torch.compiler.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    with dit_accel.attach(pipe, nag) as attachment:
        torch.testing.assert_close(run_stock(pipe, call), expected, rtol=1e-4, atol=1e-5)
        assert attachment.report().section("nag").data["calls"] == 2 * 4


def test_texts_that_can_t_be_laid_beside_the_prompt_are_refused_with_the_reason():
    pipe, call = stock_pipeline("FluxPipeline")
    for embeds, why in (
        (text_of(4), r"negative text.*4 tokens.*6.*mask"),
        (text_of(6)[..., :8], r"negative text.*8 channels.*16"),
    ):
        with dit_accel.attach(pipe, NAG(negative_embeds=embeds)), pytest.raises(ConfigError, match=why):
            run_stock(pipe, call)
    pipe, call = stock_pipeline("Flux2KleinKVPipeline")
    refused = pytest.raises(ConfigError, match=r"kv_cache.*prompt's rows")
    with dit_accel.attach(pipe, NAG(negative_embeds=text_of(6))), refused:
        run_stock(pipe, call)
    pipe, call = stock_pipeline("MochiPipeline")
    with pytest.raises(ConfigError, match=r"nag.*mochi.*processor"):
        dit_accel.attach(pipe, NAG(negative_embeds=text_of(6)))
    assert dit_accel.attachment_of(pipe) is None


def test_a_negative_prompt_is_encoded_to_the_prompt_s_own_length():
    """By both text encoders of the embedded image model, whose prompts are shorter than the pipeline's usual ones."""
    pipe = diffusers.FluxPipeline.from_pretrained(dit_accel_assets.model_path("flux-tiny"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def made(length, *methods):
        call = dict(height=32, width=32, num_inference_steps=1, max_sequence_length=length, output_type="latent")
        with dit_accel.attach(pipe, *methods, preset="none"):
            return pipe("a red circle", **call, generator=torch.Generator().manual_seed(0)).images

    with torch.no_grad():
        embeds = pipe.encode_prompt("a blue square", None, max_sequence_length=32)[0]
    assert embeds.shape[1] == 32
    by_prompt = made(32, NAG(negative_prompt="a blue square", scale=8.0))
    assert torch.equal(by_prompt, made(32, NAG(negative_embeds=embeds, scale=8.0)))
    assert not torch.equal(by_prompt, made(32, NAG(negative_prompt="a red circle", scale=8.0)))
