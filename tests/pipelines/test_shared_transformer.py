"""Pipelines that share a transformer, transformers attached to alone, two threads, and transformers replaced."""

import copy
import threading
import warnings

import diffusers
import pytest
import torch
import wan_tiny
from tiny_parts import picture
from tiny_stock import stock_pipeline

import dit_accel
from dit_accel import (
    DFA,
    NAG,
    PAG,
    SLG,
    AttachError,
    ConfigError,
    EasyCache,
    FirstBlockCache,
    LiteAttention,
    RadialAttention,
    SolAttention,
    SparseD,
    StaticCache,
)
from dit_accel.attachment.backends import ReplacedTransformer

LITE = LiteAttention(target_density=0.5, dense_steps=0, block_size=16)
RADIAL = RadialAttention(
    block_size=16, decay_factor=0.2, near="half", sink=False, dense_steps=1, dense_layers=0, dense_last_steps=0
)
CACHE = StaticCache(every=3, warmup_steps=1, last_steps=1)


def latents(pipe, call, seed=0, **changes):
    pipe.set_progress_bar_config(disable=True)
    call = {**call, "output_type": "latent", "generator": torch.Generator().manual_seed(seed), **changes}
    out = pipe(**call)
    return out.frames if hasattr(out, "frames") else out.images


@pytest.fixture
def flux():
    return stock_pipeline("FluxPipeline")


def image_to_image(pipe, **parts):
    other = diffusers.FluxImg2ImgPipeline(**{**pipe.components, **parts})
    return other, dict(image=picture(), strength=1.0, num_inference_steps=12)


@pytest.mark.parametrize("own", [False, True], ids=["one scheduler", "schedulers of their own"])
@pytest.mark.parametrize(
    "method",
    [
        CACHE,
        LiteAttention(dense_steps=0.25, target_density=0.5, block_size=16),
        SolAttention(block_size=16, dense_steps=0.25, dense_layers=0, dense_last_steps=2),
        SparseD(block_size=16, density=0.5, dense_steps=0.25, dense_layers=0),
    ],
    ids=lambda method: method.name,
)
def test_the_steps_are_those_of_the_pipeline_that_runs_whichever_was_attached_to(flux, method, own):
    pipe, call = flux
    other, changes = image_to_image(pipe, **(dict(scheduler=copy.deepcopy(pipe.scheduler)) if own else {}))
    with dit_accel.attach(other, method) as attachment:
        alone, report = latents(other, call, **changes), attachment.report()
    with dit_accel.attach(pipe, method) as attachment:
        own_run = latents(pipe, call, num_inference_steps=4)
        assert torch.equal(latents(other, call, **changes), alone)
        assert attachment.report() == report
        assert torch.equal(latents(pipe, call, num_inference_steps=4), own_run)
        assert torch.equal(latents(other, call, **changes), alone)


def test_a_pipeline_made_from_another_runs_with_its_own_steps(flux):
    pipe, call = flux
    other = diffusers.FluxImg2ImgPipeline.from_pipe(pipe)
    changes = dict(image=picture(), strength=0.5, num_inference_steps=12)
    with dit_accel.attach(other, CACHE) as attachment:
        alone, title = latents(other, call, **changes), attachment.report().section("staticcache").title
    with dit_accel.attach(pipe, CACHE) as attachment:
        latents(pipe, call, num_inference_steps=4)
        assert torch.equal(latents(other, call, **changes), alone)
        assert attachment.report().section("staticcache").title == title


def test_a_loop_by_hand_after_a_call_of_the_pipeline_has_its_own_steps(flux):
    pipe, call = flux
    with dit_accel.attach(pipe, preset="none") as attachment:
        latents(pipe, call, num_inference_steps=4)
        state = attachment.denoising
        given = dict(
            hidden_states=torch.randn(1, 80, 4), encoder_hidden_states=torch.randn(1, 6, 16), guidance=torch.ones(1),
            pooled_projections=torch.randn(1, 8), txt_ids=torch.zeros(6, 3), img_ids=_places(),
        )  # fmt: skip
        pipe.scheduler.set_timesteps(12, mu=1.0)
        for index, timestep in enumerate(pipe.scheduler.timesteps):
            with torch.no_grad():
                pipe.transformer(**given, timestep=timestep.expand(1) / 1000)
            assert (state.step_index, state.num_inference_steps) == (index, 12)
            assert state.sigma == float(pipe.scheduler.sigmas[index])
        latents(pipe, call, num_inference_steps=4)
        for timestep in pipe.scheduler.timesteps[:2]:  # the pipeline's own list, which says nothing of this loop
            with torch.no_grad():
                pipe.transformer(**given, timestep=timestep.expand(1) / 1000)
            assert state.num_inference_steps is None


def _places():
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(10), indexing="ij")
    return torch.stack([rows * 0, rows, columns], -1).flatten(0, 1).float()


def test_two_transformers_of_which_each_holds_one_prompt_are_branches_of_their_own():
    """One step each: the second transformer's forwards are not told apart by the timestep of the run before."""
    pipe, call = stock_pipeline("Ideogram4Pipeline")
    with dit_accel.attach(pipe, preset="none") as attachment:
        for _ in range(2):
            latents(pipe, call, num_inference_steps=1)
            assert [(step.transformer, step.branch) for step in attachment.report().steps] == [
                ("transformer", "cond"), ("unconditional_transformer", "uncond"),
            ]  # fmt: skip


# Two threads


def run_in(thread, work):
    """Start a thread, and return what waits for what it gave or raised."""
    found = []

    def run():
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    started = threading.Thread(target=run)
    started.start()

    def wait():
        started.join(60)
        return found[0]

    return wait


@pytest.fixture
def wan(make_pipe):
    return make_pipe()


@pytest.mark.parametrize("method", [LITE, PAG(layers="L1", scale=2.0)], ids=lambda method: method.name)
@pytest.mark.parametrize("where", ["forward", "between"])
def test_a_second_thread_around_one_attachment_is_refused_and_the_first_one_right(wan, method, where, monkeypatch):
    """In the middle of a forward of the first run, and between two of them."""
    other = diffusers.WanPipeline(**{**wan.components, "scheduler": copy.deepcopy(wan.scheduler)})
    other.set_progress_bar_config(disable=True)
    reached, go_on = threading.Event(), threading.Event()

    def pause(*_):
        reached.set()
        assert go_on.wait(60)

    def pause_in_callback(*_):
        pause()
        return {}

    with dit_accel.attach(wan, method):
        alone = wan_tiny.generate(wan)
        if where == "between":
            first = run_in("first", lambda: wan_tiny.generate(wan, callback_on_step_end=pause_in_callback))
        else:
            hook = wan.transformer.blocks[1].register_forward_pre_hook(pause)
            first = run_in("first", lambda: wan_tiny.generate(wan))
        assert reached.wait(60)
        what = "a forward" if where == "forward" else "a run of WanPipeline"
        match = rf"{what} of transformer.*thread"
        with pytest.raises(AttachError, match=match):
            wan_tiny.generate(other)
        go_on.set()
        assert torch.equal(first(), alone)
        if where == "forward":
            hook.remove()
        assert torch.equal(wan_tiny.generate(other), alone)  # the first run is over, and ran in another thread
        assert torch.equal(run_in("third", lambda: wan_tiny.generate(wan))(), alone)


def test_loops_by_hand_in_two_threads_end_in_an_error_in_both_where_they_mixed():
    transformer = wan_tiny.tiny_transformer()
    reached, go_on = threading.Event(), threading.Event()
    x, text = torch.randn(1, 12, 5, 8, 8), torch.randn(1, 6, 64)

    def forward(timestep):
        with torch.no_grad():
            return transformer(x, torch.tensor([timestep]), text, return_dict=False)[0]

    with dit_accel.attach(transformer, LITE):
        forward(900.0)

        def pause(*_):
            reached.set()
            assert go_on.wait(60)

        def other():
            forward(900.0)  # begins a run of its own, since nothing tells of the first one
            hook = transformer.blocks[1].register_forward_pre_hook(pause)
            try:
                forward(800.0)
            finally:
                hook.remove()

        second = run_in("second", other)
        assert reached.wait(60)
        with pytest.raises(AttachError, match=r"a forward.*transformer.*thread"):
            forward(800.0)
        go_on.set()
        assert isinstance(second(), AttachError)
        forward(700.0)


# Transformers compiled or replaced after attach


def compiled_after(name, *methods, **options):
    """Attach methods, let torch.compile wrap the pipeline's transformer, and generate."""
    torch._dynamo.reset()
    pipe, call = stock_pipeline(name)
    attachment = dit_accel.attach(pipe, *methods, preset="none", backend="torch")
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", **options)
    try:
        return latents(pipe, call)
    finally:
        attachment.detach()


@pytest.mark.parametrize(
    "method",
    [
        FirstBlockCache(threshold=5.0, warmup_steps=1),
        SLG(layers="L1", scale=2.0, start=0.0, stop=1.0),
        NAG(negative_embeds=torch.randn(1, 6, 16)),
        DFA(),
        EasyCache(),
    ],
    ids=lambda method: method.name,
)
@pytest.mark.parametrize("name", ["LTXPipeline", pytest.param("HunyuanVideoPipeline", marks=pytest.mark.slow)])
def test_a_transformer_compiled_after_attach_is_refused_where_methods_act_around_it_or_inside(name, method):
    with pytest.raises(ConfigError, match=r"the forward.*torch\.compile\(transformer\)"):
        compiled_after(name, method)


@pytest.mark.parametrize("method", [RADIAL, SparseD(block_size=16, density=0.3, dense_steps=1)], ids=lambda m: m.name)
def test_a_transformer_compiled_after_attach_is_refused_where_its_pipeline_tells_no_steps(method):
    with pytest.raises(ConfigError, match=r"steps.*cache_context.*torch\.compile"):
        compiled_after("LTXPipeline", method)


@pytest.mark.parametrize("fullgraph", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_transformer_compiled_after_attach_runs_attention_methods_where_its_pipeline_tells_the_steps(
    wan, fullgraph
):  # fmt: skip
    with dit_accel.attach(wan, RADIAL, backend="torch"):
        sparse = wan_tiny.generate(wan)
    torch._dynamo.reset()
    plain = wan.transformer
    with dit_accel.attach(wan, RADIAL, backend="torch") as attachment:
        wan.transformer = torch.compile(plain, backend="eager", fullgraph=fullgraph)
        torch.testing.assert_close(wan_tiny.generate(wan), sparse)
        assert attachment.report().density < 1
        assert not any("replaced" in note for note in attachment.report().notes)


def test_a_transformer_replaced_after_attach_is_told_of(wan):
    width = wan.transformer.config.text_dim
    own, other = wan.transformer, wan_tiny.tiny_transformer(7, text_dim=width)
    match = r"transformer was.*another WanTransformer3DModel"
    attachment = dit_accel.attach(wan, RADIAL, backend="torch")
    wan_tiny.generate(wan)
    assert not any("replaced" in note for note in attachment.report().notes)
    wan.transformer = other
    wan_tiny.generate(wan)
    assert any("transformer was replaced after attach by another" in note for note in attachment.report().notes)
    with pytest.warns(ReplacedTransformer, match=match):
        attachment.detach()
    wan.transformer = torch.compile(own, backend="eager")
    attachment = dit_accel.attach(wan, RADIAL, backend="torch")
    wan.transformer = own  # what is attached runs around the compiled one
    assert "was replaced after attach" in str(attachment.report())
    with pytest.warns(ReplacedTransformer):
        attachment.detach()


def test_one_of_two_experts_replaced_after_attach_is_told_of_as_the_next_run_begins(make_pipe):
    pipe = make_pipe()
    width = pipe.transformer.config.text_dim
    pipe = make_pipe(transformer_2=wan_tiny.tiny_transformer(1, text_dim=width), boundary_ratio=0.9)
    with dit_accel.attach(pipe, RADIAL, backend="torch"):
        wan_tiny.generate(pipe)
        pipe.transformer_2 = wan_tiny.tiny_transformer(2, text_dim=width)
        with pytest.warns(ReplacedTransformer, match="transformer_2 was replaced"):
            wan_tiny.generate(pipe)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ReplacedTransformer)
            wan_tiny.generate(pipe)  # once
