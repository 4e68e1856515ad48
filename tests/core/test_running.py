"""Which pipeline runs a forward, where several share a transformer."""

import sys

import diffusers
import pytest
import torch
from tiny_parts import picture
from tiny_stock import stock_pipeline

from dit_accel import RadialAttention, attach
from dit_accel.attachment.steps import current_run


@pytest.fixture
def seen(monkeypatch):
    """Collect what `site.running` gives in each forward of an attachment."""
    pipes = []

    def follow(attachment, transformer):
        state, forward = attachment.engine.layers[0].state, attachment.engine.forward
        begin = forward.begin

        def noting(batch):
            pipes.append(state.running)
            return begin(batch)

        monkeypatch.setattr(forward, "begin", noting)
        return pipes

    return follow


def test_the_pipeline_whose_call_runs_is_the_one_that_counts_not_the_one_attached_to(seen):
    pipe, call = stock_pipeline("FluxPipeline")
    call |= {"output_type": "latent", "num_inference_steps": 2}
    other = diffusers.FluxImg2ImgPipeline(**pipe.components)
    with attach(pipe, preset="none") as attachment:
        pipes = seen(attachment, pipe.transformer)
        pipe(**call)
        assert pipes == [pipe, pipe]
        pipes.clear()
        other(**call, image=picture(), strength=1.0)
        assert pipes
        assert set(map(id, pipes)) == {id(other)}
        assert attachment.engine.layers[0].state.running is None  # outside forwards


def test_a_loop_written_by_hand_has_no_pipeline(seen):
    from wan_tiny import tiny_transformer

    transformer = tiny_transformer()
    with attach(transformer, preset="none") as attachment, torch.no_grad():
        pipes = seen(attachment, transformer)
        transformer(torch.randn(1, 12, 5, 8, 8), torch.tensor([900.0]), torch.randn(1, 6, 64))
        assert pipes == [None]


def test_nothing_runs_outside_a_call():
    pipe, _ = stock_pipeline("FluxPipeline")
    assert current_run(pipe.transformer) is None


def test_a_modular_pipeline_is_found_too():
    made, call = stock_pipeline("MiniMaxH3ModularPipeline")
    transformer = made.components["transformer"]
    found = []
    with attach(transformer, preset="none") as attachment:
        handle = transformer.register_forward_hook(lambda *_: found.append(current_run(transformer).pipe))
        made(**call)
        handle.remove()
        assert set(map(id, found)) == {id(made.pipe)}
        assert attachment.denoising.num_inference_steps == len(found)


def test_a_run_goes_on_until_its_call_returns():
    pipe, call = stock_pipeline("FluxPipeline")
    runs = []

    def look(*_):
        runs.append(current_run(pipe.transformer))
        assert runs[-1].goes_on()
        assert runs[-1].is_same(runs[0])

    handle = pipe.transformer.register_forward_hook(look)
    pipe(**call | {"output_type": "latent", "num_inference_steps": 2})
    handle.remove()
    assert len(runs) == 2
    assert runs[0].pipe is pipe
    assert not runs[0].goes_on()
    assert not runs[0].is_same(None)


def test_a_run_is_the_pipelines_call_not_a_method_of_it_further_in():
    pipe, _ = stock_pipeline("FluxPipeline")
    found = []

    class Outer(type(pipe)):
        def __call__(self):
            found.append(id(sys._getframe()))
            self.denoise()

        def denoise(self):
            found.append(current_run(self.transformer).frame)

    Outer(**pipe.components)()
    assert found[0] == found[1]


def test_observers_get_no_output_before_corrections_where_no_method_corrects():
    from wan_tiny import tiny_transformer

    transformer, seen = tiny_transformer(), []
    radial = RadialAttention(block_size=16, dense_steps=0, dense_layers=0, dense_last_steps=0, decay_factor=0.2)
    with attach(transformer, radial) as attachment, attachment.observe(seen.append), torch.no_grad():
        transformer(torch.randn(1, 12, 5, 8, 8), torch.tensor([900.0]), torch.randn(1, 6, 64))
    assert seen
    assert all(call.planned is None for call in seen)
