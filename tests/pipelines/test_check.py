"""One seed dense and with the methods, side by side: `Attachment.check` and `Attachment.suspended`."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_stock import stock_pipeline
from wan_tiny import generate

import dit_accel
from dit_accel import AttachError, ConfigError, EasyCache, RadialAttention, StaticCache
from dit_accel.attachment import check
from dit_accel.report import clock

CALL = dict(num_frames=9, height=32, width=32, num_inference_steps=6, guidance_scale=3.0, max_sequence_length=16)
CACHE = StaticCache(every=2, warmup_steps=1, last_steps=0)


def test_two_runs_of_one_seed_are_compared(pipe, tmp_path):
    def made():
        return pipe("a red circle", generator=torch.Generator().manual_seed(3), output_type="np", **CALL).frames[0]

    with dit_accel.attach(pipe, CACHE) as attachment:
        result, again = attachment.check("a red circle", seed=3, **CALL), made()
    assert np.array_equal(result.dense, made())
    assert np.array_equal(result.accelerated, again)
    error = np.mean((result.dense - result.accelerated) ** 2)
    assert result.metrics["psnr"] == pytest.approx(-10 * np.log10(error), abs=1e-3)
    assert {*result.metrics, *result.not_measured} == {"psnr", "ssim", "lpips@alex"}
    assert "same seed" in str(result)
    result.save(tmp_path / "check.png")
    assert Image.open(tmp_path / "check.png").width > 100
    with pytest.raises(ConfigError, match=r"check\.mp4"):
        result.save(tmp_path / "check.mp4")


class Ticks:
    """A clock that moves when it is told to: a forward takes a second, other parts of a call theirs."""

    now = 0.0

    def taking(self, run, seconds):
        def timed(*args, **kwargs):
            self.now += seconds
            return run(*args, **kwargs)

        return timed


@pytest.fixture
def ticks(pipe, monkeypatch):
    ticks = Ticks()
    monkeypatch.setattr(clock, "now", lambda: ticks.now)
    for of, name, seconds in (
        (pipe.text_encoder, "forward", 1.0), (pipe.transformer.blocks[0], "forward", 1.0), (pipe.vae, "decode", 3.0),
        (pipe.scheduler, "step", 0.25),
    ):  # fmt: skip
        monkeypatch.setattr(of, name, ticks.taking(getattr(of, name), seconds))
    return ticks


def test_the_measured_speedup_is_that_of_a_stopwatch_around_the_call(pipe, ticks):
    def seconds():
        begun = ticks.now
        pipe("a red circle", output_type="np", **CALL)
        return ticks.now - begun

    dense = seconds()
    with dit_accel.attach(pipe, CACHE) as attachment:
        for _ in range(2):
            taken, timing = seconds(), attachment.report().timing
            assert timing.call == pytest.approx(taken)
            assert timing.speedup == pytest.approx(dense / taken, rel=0.02)
            assert timing.loop_speedup > timing.speedup
        with pytest.raises(ValueError, match="divisible"):
            pipe("a red circle", **{**CALL, "height": 33})
        config = pipe.transformer.config
        latents, text = torch.randn(1, config.in_channels, 3, 4, 4), torch.randn(1, 6, config.text_dim)
        pipe.transformer(latents, torch.tensor([999.0]), text)
        assert attachment.report().timing.call is None  # a loop by hand
    assert not {"check_inputs", "maybe_free_model_hooks"} & {*vars(pipe)}


def test_a_picture_is_one_frame_and_methods_that_change_nothing_are_equal(pipe):
    with dit_accel.attach(pipe, EasyCache(threshold=0.0)) as attachment:
        result = attachment.check("a red circle", **CALL)
    assert np.array_equal(result.dense, result.accelerated)
    flux, call = stock_pipeline("FluxPipeline")
    call["num_inference_steps"] = 4
    with dit_accel.attach(flux, CACHE) as attachment:  # embeddings stand for a prompt
        result = attachment.check(**{key: value for key, value in call.items() if key != "output_type"})
    assert len(result.dense) == len(result.accelerated) == 1
    assert not np.array_equal(result.dense, result.accelerated)


def test_short_runs_are_made_twice_and_the_faster_one_counts(pipe, ticks, monkeypatch):
    call = {**CALL, "guidance_scale": 1.0}
    monkeypatch.setattr(check, "SHORT", 33.0)  # 1 for the text, 3 to decode, 6 steps of 1.25 s; 2.5 s are saved
    with dit_accel.attach(pipe, StaticCache(every=2, warmup_steps=2, last_steps=0)) as attachment:
        slow, decode = iter([9.0, 0.0, 0.0, 5.0, 0.0, 0.0]), pipe.vae.decode
        monkeypatch.setattr(pipe.vae, "decode", lambda *a, **k: ticks.taking(decode, next(slow))(*a, **k))
        result = attachment.check("a red circle", **call)
        assert (result.dense_seconds, result.accelerated_seconds, result.runs) == (11.5, 9.5, 2)
        assert str(result).startswith("the faster of 2 runs each, same seed: 9.5 s instead of 11.5 s in the whole call")
        monkeypatch.setattr(check, "SHORT", 20.0)
        assert attachment.check("a red circle", **call).runs == 1


def test_suspended_methods_are_off_inside_and_on_again_behind(pipe):
    plain, seen = generate(pipe), []
    with dit_accel.attach(pipe, CACHE, RadialAttention(block_size=16, dense_steps=1)) as attachment:
        with_methods = generate(pipe)
        with attachment.observe(seen.append):
            with attachment.suspended():
                assert torch.equal(generate(pipe), plain)
                assert dit_accel.attachment_of(pipe) is None
                assert not seen
            assert dit_accel.attachment_of(pipe) is attachment
            assert torch.equal(generate(pipe), with_methods)
            assert seen
        with pytest.raises(KeyError), attachment.suspended():
            raise KeyError
        assert torch.equal(generate(pipe), with_methods)


def test_what_cannot_be_checked_is_refused(pipe):
    with dit_accel.attach(pipe.transformer, CACHE) as attachment, pytest.raises(AttachError, match="pipeline"):
        attachment.check("a red circle")
    attachment = dit_accel.attach(pipe, CACHE)
    attachment.detach()
    with pytest.raises(AttachError, match="detached"):
        attachment.check("a red circle", **CALL)
