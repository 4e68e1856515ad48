"""Pipelines that share a transformer, two threads around one, and transformers compiled or replaced after attach."""

import copy
import threading
import warnings

import diffusers
import pytest
import torch
from tiny_parts import picture
from tiny_stock import run_stock, stock_pipeline
from wan_tiny import generate, tiny_transformer

import dit_accel as d
from dit_accel.attachment.backends import ReplacedTransformer

LITE = d.LiteAttention(target_density=0.5, dense_steps=0, block_size=16)
RADIAL = d.RadialAttention(
    block_size=16, decay_factor=0.2, near="half", sink=False, dense_steps=1, dense_layers=0, dense_last_steps=0
)
CACHE = d.StaticCache(every=3, warmup_steps=1, last_steps=1)
SPARSED = d.SparseD(block_size=16, density=0.5, dense_steps=0.25, dense_layers=0)


@pytest.mark.parametrize("method", [CACHE, SPARSED], ids=lambda method: method.name)
def test_the_steps_are_those_of_the_pipeline_that_runs_whichever_was_attached_to(method):
    """An image to image pipeline made from another one, which begins in the middle."""
    pipe, call = stock_pipeline("FluxPipeline")
    other = diffusers.FluxImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    changes = dict(image=picture(), strength=0.5, num_inference_steps=12)
    with d.attach(other, method) as attachment:
        alone, report = run_stock(other, call, **changes), attachment.report()
    with d.attach(pipe, method) as attachment:
        latents = run_stock(pipe, call)
        assert torch.equal(run_stock(other, call, **changes), alone)
        assert attachment.report() == report
        assert torch.equal(run_stock(pipe, call), latents)


# Two threads


def run_in_thread(work):
    """Start a thread, and return what waits for what it gave or raised."""
    results = []

    def run():
        try:
            results.append(work())
        except Exception as error:
            results.append(error)

    started = threading.Thread(target=run)
    started.start()

    def wait():
        started.join(60)
        return results[0]

    return wait


class Pause:
    """Stops the thread that comes to it until another goes on."""

    def __init__(self):
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __call__(self, *_):
        self.reached.set()
        assert self.go_on.wait(60)

    def in_callback(self, *_):
        self()
        return {}


@pytest.fixture
def wan(make_pipe):
    return make_pipe()


@pytest.mark.parametrize(("where", "method"), [("a forward", LITE), ("of WanPipeline", d.PAG(layers="L1", scale=2.0))])
def test_a_second_thread_around_one_attachment_is_refused_and_the_first_one_right(wan, where, method):
    """In the middle of a forward of the first run, and between two of them."""
    other = diffusers.WanPipeline(**{**wan.components, "scheduler": copy.deepcopy(wan.scheduler)})
    other.set_progress_bar_config(disable=True)
    pause = Pause()
    with d.attach(wan, method):
        alone = generate(wan)
        if where == "a forward":
            hook = wan.transformer.blocks[1].register_forward_pre_hook(pause)
            first = run_in_thread(lambda: generate(wan))
        else:
            first = run_in_thread(lambda: generate(wan, callback_on_step_end=pause.in_callback))
        assert pause.reached.wait(60)
        with pytest.raises(d.AttachError, match=rf"{where} of transformer.*thread"):
            generate(other)
        pause.go_on.set()
        assert torch.equal(first(), alone)
        if where == "a forward":
            hook.remove()
        assert torch.equal(generate(other), alone)  # the first run is over, and ran in another thread
        assert torch.equal(run_in_thread(lambda: generate(wan))(), alone)


def test_loops_by_hand_in_two_threads_end_in_an_error_in_both_where_they_mixed():
    transformer, pause = tiny_transformer(), Pause()
    x, text = torch.randn(1, 12, 5, 8, 8), torch.randn(1, 6, 64)

    def forward(timestep):
        with torch.no_grad():
            return transformer(x, torch.tensor([timestep]), text, return_dict=False)[0]

    def other():
        forward(900.0)  # begins a run of its own, since nothing tells of the first one
        hook = transformer.blocks[1].register_forward_pre_hook(pause)
        try:
            forward(800.0)
        finally:
            hook.remove()

    with d.attach(transformer, LITE):
        forward(900.0)
        second = run_in_thread(other)
        assert pause.reached.wait(60)
        with pytest.raises(d.AttachError, match=r"a forward.*transformer.*thread"):
            forward(800.0)
        pause.go_on.set()
        assert isinstance(second(), d.AttachError)
        forward(700.0)


# Transformers compiled or replaced after attach

AROUND, STEPS = r"the forward.*torch\.compile\(transformer\)", r"steps.*cache_context.*torch\.compile"
REFUSED = [
    (d.FirstBlockCache(threshold=5.0, warmup_steps=1), AROUND),
    (d.SLG(layers="L1", scale=2.0, start=0.0, stop=1.0), AROUND),
    (d.NAG(negative_embeds=torch.zeros(1, 6, 16)), AROUND),
    (d.DFA(), AROUND),
    (d.EasyCache(), AROUND),
    (RADIAL, STEPS),  # which the pipeline does not tell
]


@pytest.mark.parametrize(("method", "why"), REFUSED, ids=lambda one: getattr(one, "name", ""))
def test_a_transformer_compiled_after_attach_is_refused_where_methods_act_around_it_or_need_steps(method, why):
    torch._dynamo.reset()
    pipe, call = stock_pipeline("LTXPipeline")
    with d.attach(pipe, method, preset="none", backend="torch"):
        plain, pipe.transformer = pipe.transformer, torch.compile(pipe.transformer, backend="eager")
        with pytest.raises(d.ConfigError, match=why):
            run_stock(pipe, call)
        pipe.transformer = plain


@pytest.mark.parametrize("fullgraph", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_transformer_compiled_after_attach_runs_attention_methods_where_its_pipeline_tells_the_steps(wan, fullgraph):
    plain = wan.transformer
    with d.attach(wan, RADIAL, backend="torch"):
        sparse = generate(wan)
    torch._dynamo.reset()
    with d.attach(wan, RADIAL, backend="torch") as attachment:
        wan.transformer = torch.compile(plain, backend="eager", fullgraph=fullgraph)
        torch.testing.assert_close(generate(wan), sparse)
        assert attachment.report().density < 1
        assert not any("replaced" in note for note in attachment.report().notes)


def test_a_transformer_replaced_after_attach_is_told_of(wan):
    plain, other = wan.transformer, tiny_transformer(7, text_dim=96)
    attachment = d.attach(wan, RADIAL, backend="torch")
    wan.transformer = other
    generate(wan)
    assert any("transformer was replaced after attach by another" in note for note in attachment.report().notes)
    with pytest.warns(ReplacedTransformer, match=r"transformer was.*another WanTransformer3DModel"):
        attachment.detach()
    wan.transformer = torch.compile(plain, backend="eager")
    attachment = d.attach(wan, RADIAL, backend="torch")
    wan.transformer = plain  # what is attached runs around the compiled one
    assert "was replaced after attach" in str(attachment.report())
    with pytest.warns(ReplacedTransformer):
        attachment.detach()


def test_one_of_two_experts_replaced_after_attach_is_told_of_as_the_next_run_begins(make_pipe):
    pipe = make_pipe(transformer_2=tiny_transformer(1, text_dim=96), boundary_ratio=0.9)
    with d.attach(pipe, RADIAL, backend="torch"):
        generate(pipe)
        pipe.transformer_2 = tiny_transformer(2, text_dim=96)
        with pytest.warns(ReplacedTransformer, match="transformer_2 was replaced"):
            generate(pipe)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ReplacedTransformer)
            generate(pipe)  # once
