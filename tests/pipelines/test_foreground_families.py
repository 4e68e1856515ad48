"""Foreground-only attention on every video family: neutral ones change no bit, reused rows keep what they gave."""

import pytest
import torch
from tiny_models import MODELS

import dit_accel
from dit_accel.adapters import installed
from dit_accel.methods.attention.dfa import DFA
from dit_accel.methods.site import target_sample
from dit_accel.rules.foreground import predicted
from dit_accel.testing.tiny_models import Case

EVERY_2 = dict(every=2, warmup_steps=0, last_steps=0)
VIDEO = [name for name in MODELS if "dfa" not in installed.adapters()[name].refused]


@pytest.mark.parametrize("name", VIDEO)
def test_every_family(name):
    for model in MODELS[name]:
        case, calls = Case(installed.adapters()[name], model), []
        inputs = case.inputs()
        steps = inputs, case.with_latents(inputs, 1.5 * case.latents(inputs))
        plain = [case.run(given, step) for step, given in enumerate(steps)]
        with dit_accel.attach(case.transformer, DFA(share=1.0, **EVERY_2)):
            assert all(torch.equal(case.run(given, step), plain[step]) for step, given in enumerate(steps))
        with dit_accel.attach(case.transformer, DFA(share=0.0, **EVERY_2)) as attached, attached.observe(calls.append):
            assert torch.equal(case.run(steps[0], 0), plain[0])
            reused = case.run(steps[1], 1)
        full, partial = calls[: len(calls) // 2], calls[len(calls) // 2 :]
        assert [call.context.key for call in full] == [call.context.key for call in partial]
        for before, now in zip(full, partial, strict=True):
            layout = now.context.layout
            assert before.plan.reused is None
            assert now.plan.reused.rows[0].tolist() == [
                *range(layout.text_before),
                *range(layout.visual.stop, layout.tokens),
            ]
            assert torch.equal(now.out[:, :, layout.visual], before.out[:, :, layout.visual])
        assert reused.isfinite().all()
        assert not torch.equal(reused, plain[0])  # all but attention is this step's own
        assert not torch.equal(reused, plain[1])
        assert torch.equal(case.run(steps[1], 1), plain[1])


@pytest.mark.parametrize("name", VIDEO)
def test_predictions_can_be_laid_on_every_familys_tokens(name):
    """Whatever stands among the latents besides the video: reference frames, keyframes, images that are given."""
    for model in MODELS[name]:
        case = Case(installed.adapters()[name], model)
        inputs = case.inputs()
        frames, height, width, before, after = case.adapter.grid(case.transformer.config, inputs)
        with torch.no_grad():
            v = target_sample(case.transformer(**inputs, return_dict=False))
        x = target_sample(inputs[case.adapter.latents])
        clean = predicted(x, v, 0.5, (frames, height, width), before, after)
        assert clean.shape[:4] == (len(v), frames, height, width)
