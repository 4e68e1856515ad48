"""The third branch, folded into stock pipelines, gives the three-branch formula, which is written down apart."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch
import torch.nn.functional as F
import wan_tiny
from parallel_ranks import weakened
from tiny_stock import run_stock, stock_pipeline
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import dit_accel
from dit_accel import PAG, SLG, AutoGuidance, ConfigError, SoftPAG


class Mixed(TorchFunctionMode):
    """Mixes V into the output of some heads of ``F.scaled_dot_product_attention``, while it is armed."""

    def __init__(self, heads: Sequence[int], u: float) -> None:
        super().__init__()
        self.heads, self.u, self.armed = list(heads), u, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention and self.armed:
            values = args[2] if len(args) > 2 else kwargs["value"]
            out = out.clone()
            out[:, self.heads] = (1 - self.u) * out[:, self.heads] + self.u * values[:, self.heads]
        return out


@contextlib.contextmanager
def perturbed_heads(attention: nn.Module, heads: Sequence[int], u: float) -> Iterator[None]:
    """Mix V into some heads of one attention module."""
    mode = Mixed(heads, u)
    before = attention.register_forward_pre_hook(lambda *_: setattr(mode, "armed", True))
    after = attention.register_forward_hook(lambda *_: setattr(mode, "armed", False))
    try:
        with mode:
            yield
    finally:
        before.remove()
        after.remove()


@contextlib.contextmanager
def three_branches(
    pipe: Any, perturbed: Callable[[nn.Module], Any], scale: float, *, batched: bool
) -> Iterator[list[float]]:
    """Let a pipeline's scheduler get its guided prediction plus w (cond - perturbed); note each step's size of that.

    Args:
        pipe: the pipeline, with nothing attached.
        perturbed: transformer -> a context in which its forward is perturbed.
        scale: w.
        batched: both prompts are in one forward, the negative one first; else the conditional forward comes first.
    """
    forwards: list[tuple[Any, Any, Any, Tensor]] = []
    noted: list[float] = []
    step = pipe.scheduler.step

    def observed(transformer: Any, forward: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            forwards.append(((transformer, forward), args, kwargs, out[0] if isinstance(out, tuple) else out.sample))
            return out

        return call

    def guided(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        (transformer, forward), given, named, cond = forwards[0]
        with perturbed(transformer), torch.no_grad():
            out = forward(*given, **named)
        further = scale * (cond - (out[0] if isinstance(out, tuple) else out.sample))
        if batched:
            further = further.chunk(2)[1]
        noted.append(float(further.norm()))
        forwards.clear()
        return step(model_output + further[:, : model_output.shape[1]].to(model_output.dtype), *args, **kwargs)

    with contextlib.ExitStack() as stack:
        for name in ("transformer", "transformer_2"):
            if (part := getattr(pipe, name, None)) is not None:
                forward = observed(part, part.forward)
                stack.enter_context(mock.patch.object(part, "forward", forward))
        stack.enter_context(mock.patch.object(pipe.scheduler, "step", guided))
        yield noted


NEGATIVE = dict(negative_prompt_embeds=torch.ones(1, 6, 16), negative_pooled_prompt_embeds=torch.ones(1, 8))
CASES = {
    "flux, guidance embedded": ("FluxPipeline", {}, "attn", False),
    "flux, two calls": ("FluxPipeline", dict(true_cfg_scale=2.0, **NEGATIVE), "attn", False),
    "sd3, one call": ("StableDiffusion3Pipeline", dict(guidance_scale=3.0), "attn", True),
    "sd3, guidance off": ("StableDiffusion3Pipeline", dict(guidance_scale=1.0), "attn", False),
    "hunyuan-video, two calls": ("HunyuanVideoPipeline", {}, "attn", False),
    "hunyuan-video, embedded": ("HunyuanVideoPipeline", dict(true_cfg_scale=1.0), "attn", False),
    "cogvideox, one call": ("CogVideoXPipeline", {}, "attn1", True),
    "cogvideox, a scale that moves": (
        "CogVideoXPipeline", dict(use_dynamic_cfg=True, guidance_scale=6.0), "attn1", True,
    ),
    "ltx, one call": ("LTXPipeline", {}, "attn1", True),
    "qwen-image, guidance off": ("QwenImagePipeline", dict(true_cfg_scale=1.0), "attn", False),
}  # fmt: skip


def formula(pipe, run, changed, scale, batched=False):
    """Return the latents of a plain run and of one with the formula written down, and how many forwards it added."""
    plain = run()
    with three_branches(pipe, changed, scale, batched=batched) as sizes:
        return plain, run(), sizes


def require_formula(made, expected, plain):
    """Require of latents that they are the expected ones, which are others than the plain ones."""
    moved = float((expected - plain).norm() / plain.norm())
    assert moved > 1e-4
    error = float((made - expected).norm() / expected.norm())
    assert error <= 1e-5, f"{error:.2g}, the branch moved the result by {moved:.2g}"


@pytest.mark.sample
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("heads", "u"), [((1,), 0.6), ((0, 1), 1.0)])
def test_the_fold_is_the_formula(case, heads, u):
    name, changes, module, batched = CASES[case]
    pipe, call = stock_pipeline(name)

    def perturbed(transformer):
        return perturbed_heads(transformer.transformer_blocks[1].get_submodule(module), heads, u)

    plain, expected, sizes = formula(pipe, lambda: run_stock(pipe, call, **changes), perturbed, 3.0, batched)
    assert min(sizes) > 0
    spec = "L1" if len(heads) == 2 else f"L1H{heads[0]}"
    with dit_accel.attach(pipe, SoftPAG(heads=spec, u=u, scale=3.0)) as attachment:
        require_formula(run_stock(pipe, call, **changes), expected, plain)
        assert attachment.report().section("softpag").data["forwards_added"] == len(sizes)


@pytest.mark.parametrize(("scale", "experts"), [(1.0, 2), (4.0, 1), (4.0, 2)])
def test_wan_in_two_calls_with_one_expert_and_with_two(make_pipe, scale, experts):
    extra, changes = {}, dict(guidance_scale=scale)
    if experts == 2:
        extra = dict(transformer_2=wan_tiny.tiny_transformer(1, text_dim=96), boundary_ratio=0.9)
        changes["guidance_scale_2"] = scale + 2.0
    pipe = make_pipe(**extra)

    def perturbed(transformer):
        return perturbed_heads(transformer.blocks[1].attn1, (0,), 0.7)

    plain, expected, _ = formula(pipe, lambda: wan_tiny.generate(pipe, **changes), perturbed, 2.0)
    with dit_accel.attach(pipe, SoftPAG(heads="L1H0", u=0.7, scale=2.0)) as attachment:
        require_formula(wan_tiny.generate(pipe, **changes), expected, plain)
        ran = {step.transformer for step in attachment.report().steps if step.branch == "cond/softpag"}
    assert len(ran) == experts


def test_slg_is_the_formula_with_a_block_left_out(make_pipe):
    pipe = make_pipe()

    def skipped(transformer):
        return mock.patch.object(transformer.blocks[1], "forward", lambda hidden_states, *_, **__: hidden_states)

    plain, expected, _ = formula(pipe, lambda: wan_tiny.generate(pipe), skipped, 2.8)
    with dit_accel.attach(pipe, SLG(layers="L1", start=0.0, stop=1.0, scale=2.8)):
        require_formula(wan_tiny.generate(pipe), expected, plain)


@contextlib.contextmanager
def weights_of(weak, transformer):
    """Let a transformer have the weights of another inside the block."""
    own = copy.deepcopy(transformer.state_dict())
    transformer.load_state_dict(weak.state_dict())
    yield
    transformer.load_state_dict(own)


def test_autoguidance_is_the_formula_with_a_weaker_model(make_pipe, tmp_path):
    pipe = make_pipe()
    weak = weakened(pipe.transformer)
    weak.save_pretrained(tmp_path / "weak" / "transformer")
    plain, expected, _ = formula(pipe, lambda: wan_tiny.generate(pipe), partial(weights_of, weak), 1.5)
    for options in ({"weak_transformer": weak}, {"weak": str(tmp_path / "weak")}):
        with dit_accel.attach(pipe, AutoGuidance(scale=1.5, **options)) as attachment:
            require_formula(wan_tiny.generate(pipe), expected, plain)
            assert "the weaker model" in attachment.report().sections[0].title


def test_autoguidance_in_one_call_runs_the_weaker_model_on_the_prompt_alone():
    pipe, call = stock_pipeline("StableDiffusion3Pipeline")
    weak = weakened(pipe.transformer)
    plain, expected, _ = formula(pipe, lambda: run_stock(pipe, call), partial(weights_of, weak), 1.5, batched=True)
    rows = []
    weak.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True)
    with dit_accel.attach(pipe, AutoGuidance(scale=1.5, weak_transformer=weak)):
        require_formula(run_stock(pipe, call), expected, plain)
    assert set(rows) == {1}


def test_a_weaker_model_that_is_none_is_refused(make_pipe, tmp_path):
    pipe = make_pipe()
    for options, text in (
        ({}, r"none is set; set autoguidance\.weak"),
        ({"weak": str(tmp_path / "nowhere")}, r"nowhere' has no Wan.*loaded"),
        ({"weak_transformer": pipe.transformer}, "model itself,"),
    ):
        with pytest.raises(ConfigError, match=text):
            dit_accel.attach(pipe, AutoGuidance(**options))
    other = wan_tiny.tiny_transformer(1, text_dim=96, out_channels=8)
    with dit_accel.attach(pipe, AutoGuidance(weak_transformer=other)), pytest.raises(ConfigError, match="one shape"):
        wan_tiny.generate(pipe)


def test_pipelines_that_rescale_by_the_conditional_prediction_are_refused_with_the_reason():
    method = SoftPAG(heads="L1", u=1.0)
    pipe, call = stock_pipeline("QwenImagePipeline")
    with dit_accel.attach(pipe, method), pytest.raises(ConfigError, match=r"softpag.*guidance: it rescales.*norm"):
        run_stock(pipe, call)
    pipe, call = stock_pipeline("LTXPipeline")
    refused = pytest.raises(ConfigError, match=r"guidance: guidance_rescale = 0\.7.*softpag\.mode = 'free'")
    with dit_accel.attach(pipe, method), refused:
        run_stock(pipe, call, guidance_rescale=0.7)
    with dit_accel.attach(pipe, SoftPAG(heads="L1", u=1.0, mode="free")):
        assert run_stock(pipe, call, guidance_rescale=0.7).isfinite().all()


GUIDERS = {
    "apg": diffusers.AdaptiveProjectedMixGuidance(guidance_scale=2.0, enabled=True),
    "rescaled": diffusers.ClassifierFreeGuidance(guidance_scale=2.0, guidance_rescale=0.7),
    "cfg": diffusers.ClassifierFreeGuidance(guidance_scale=2.0),
    "zero star": diffusers.ClassifierFreeZeroStarGuidance(guidance_scale=2.0),
    "off": diffusers.ClassifierFreeGuidance(guidance_scale=1.0),
}


@pytest.mark.parametrize("guider", GUIDERS.values(), ids=GUIDERS)
def test_behind_any_guider_the_branch_is_added_to_its_result(guider):
    pipe, call = stock_pipeline("HunyuanImagePipeline")
    pipe.guider = guider

    def perturbed(transformer):
        return perturbed_heads(transformer.get_submodule("transformer_blocks.1.attn"), (1,), 0.6)

    plain, expected, _ = formula(pipe, lambda: run_stock(pipe, call), perturbed, 3.0)
    with dit_accel.attach(pipe, SoftPAG(heads="L1H1", u=0.6)) as attachment:
        require_formula(run_stock(pipe, call), expected, plain)
        assert attachment.report().section("softpag").data["forwards_added"] == 3
        pipe.guider = diffusers.AdaptiveProjectedMixGuidance(guidance_scale=2.0, enabled=True)
        with pytest.raises(ConfigError, match="guider AdaptiveProjectedMixGuidance"):
            run_stock(pipe, call)
    assert "forward" not in vars(guider)


@pytest.mark.parametrize("mode", ["branch", "free"])
def test_a_transformer_for_each_prompt_runs_twice_alike_in_one_step(mode):
    pipe, call = stock_pipeline("Ideogram4Pipeline")
    call["num_inference_steps"] = 1
    plain = run_stock(pipe, call)
    with dit_accel.attach(pipe, PAG(layers="L1", mode=mode)) as attachment:
        first, second = (run_stock(pipe, call) for _ in range(2))
        assert attachment.report().section("pag").data["forwards_added"] == (mode == "branch")
    assert torch.equal(first, second)
    assert not torch.equal(first, plain)


def test_ideogram_s_third_branch_is_the_formula():
    pipe, call = stock_pipeline("Ideogram4Pipeline")

    def perturbed(transformer):
        return perturbed_heads(transformer.get_submodule("layers.1.attention"), (1,), 0.6)

    conditional = pipe.transformer
    forwards, step = [], pipe.scheduler.step

    def observed(*args, **kwargs):
        out = forward(*args, **kwargs)
        forwards.append((args, kwargs, out[0]))
        return out

    def guided(model_output, *args, **kwargs):
        ((given, named, cond),) = forwards
        forwards.clear()
        with perturbed(conditional), torch.no_grad():
            further = 3.0 * (cond - forward(*given, **named)[0])
        further = further[:, -model_output.shape[1] :].to(model_output.dtype)
        return step(model_output - further, *args, **kwargs)  # the pipeline steps by the negative velocity

    forward = conditional.forward
    with mock.patch.object(conditional, "forward", observed), mock.patch.object(pipe.scheduler, "step", guided):
        expected = run_stock(pipe, call)
    plain = run_stock(pipe, call)
    with dit_accel.attach(pipe, SoftPAG(heads="L1H1", u=0.6, scale=3.0)):
        require_formula(run_stock(pipe, call), expected, plain)
