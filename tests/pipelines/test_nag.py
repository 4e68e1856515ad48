"""NAG in stock pipelines agrees with its formula, written down here apart; and what it refuses."""

import contextlib
import json
from pathlib import Path
from unittest import mock

import pytest
import torch
import wan_tiny
from tiny_stock import run_stock, stock_pipeline
from typer.testing import CliRunner

import dit_accel
from dit_accel import NAG, ConfigError
from dit_accel.cli.app import app

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


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("tau", [1.02, 2.5])
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
        section = attachment.report().section("nag")
        again = wan_tiny.generate(pipe, **run)
        forwards = attachment.engine.recorder.forwards_run
    assert float((expected - plain).norm() / plain.norm()) > 1e-4
    assert float((made - expected).norm() / expected.norm()) <= 1e-5
    assert torch.equal(made, again)
    assert torch.equal(wan_tiny.generate(pipe, **run), plain)
    assert section.data == {"steps": [0, 1, 2, 3], "branches": ["cond"], "forwards": 4, "calls": 12}
    assert forwards == (4 if guidance == 1.0 else 8)


def test_a_prompt_is_encoded_as_the_pipeline_encodes_its_own(make_pipe):
    pipe = make_pipe()
    with dit_accel.attach(pipe, NAG(scale=8.0, negative_prompt=NEGATIVE)):
        told = wan_tiny.generate(pipe, guidance_scale=1.0)
    with dit_accel.attach(pipe, NAG(scale=8.0, negative_embeds=embeds_of(pipe))):
        given = wan_tiny.generate(pipe, guidance_scale=1.0)
    assert torch.equal(told, given)
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
    own = call["prompt_embeds"][:, valid]
    with dit_accel.attach(pipe, NAG(negative_embeds=own)) as attachment:
        torch.testing.assert_close(run_stock(pipe, call), plain, rtol=1e-3, atol=1e-3)
        assert attachment.report().section("nag").data["forwards"] > 0
    with dit_accel.attach(pipe, NAG(negative_embeds=own.flip(-1), scale=11.0)):
        assert not torch.allclose(run_stock(pipe, call), plain, rtol=1e-2, atol=1e-2)
    assert torch.equal(run_stock(pipe, call), plain)


def test_generate_takes_a_negative_prompt_at_guidance_1(tmp_path):
    def made(name, *options):
        output = tmp_path / f"{name}.mp4"
        quick = ["--num-inference-steps", "2", "--num-frames", "9", "--height", "32", "--width", "48"]
        result = CliRunner().invoke(
            app, ["generate", "a red circle moving right", *quick, "--guidance-scale", "1", *options, "-o", str(output)]
        )
        assert result.exit_code == 0, result.stderr
        return output.read_bytes(), json.loads(Path(f"{output}.json").read_text())

    plain, _ = made("plain")
    away, record = made("away", "--nag", "--set", "nag.negative_prompt=a blue square, moving left")
    again, _ = made("again", "--nag", "--set", "nag.negative_prompt=a blue square, moving left")
    assert away == again
    assert away != plain
    assert record["methods"]["nag"]["negative_prompt"] == "a blue square, moving left"
    assert record["report"]["sections"]["nag"]["forwards"] == 2


def test_a_plan_says_what_it_costs():
    result = CliRunner().invoke(app, ["plan", "--family", "wan2.1-1.3b", "--nag"])
    assert result.exit_code == 0, result.stderr
    told = " ".join((result.stdout + result.stderr).split())
    assert "nag computes the cross-attention of the conditional forward twice in 50 steps" in told
    result = CliRunner().invoke(app, ["plan", "--family", "flux.1-dev", "--nag"])
    assert result.exit_code == 0, result.stderr
    told = " ".join((result.stdout + result.stderr).split())
    assert "nag runs the conditional forward for two texts in 28 steps, as dear as a forward more in each" in told
    result = CliRunner().invoke(app, ["plan", "--family", "mochi-1", "--nag"])
    assert result.exit_code != 0
    assert "on mochi it can't: its processor attends row by row" in " ".join(result.stderr.split())
