"""ReferenceCache on editing models: which tokens are computed, what attention reads, and where that is exact."""

import pytest
import tiny_models as tiny
import torch
from matrix_runs import prepared, run
from some_cases import some

import dit_accel as d
from dit_accel.adapters.installed import adapter_for
from dit_accel.errors import ConfigError
from dit_accel.testing.tiny_models import Case, TinyModel, wide_inputs

EDITING = {
    "FluxKontextPipeline": 6, "Flux2Pipeline, references": 16, "QwenImageEditPipeline": 6,
    "QwenImageEditPlusPipeline": 12, "QwenImageLayeredPipeline": 80, "LongCatImageEditPipeline": 80,
}  # fmt: skip
"""Pipeline -> tokens of its reference images."""


@pytest.mark.parametrize("name", some(EDITING, "FluxKontextPipeline", "QwenImageEditPlusPipeline"))
def test_reference_tokens_are_computed_in_every_second_step_alone(name):
    pipe, call = prepared(name)
    seen, plain = [], run(pipe, call)
    pipe.transformer.transformer_blocks[-1].register_forward_pre_hook(
        lambda block, args, inputs: seen.append(inputs["hidden_states"].shape[1]), with_kwargs=True
    )
    with d.attach(pipe, d.ReferenceCache(refresh_every=1)):
        assert torch.equal(run(pipe, call), plain)
    assert len(set(seen)) == 1
    whole, forwards = seen[0], len(seen) // 5
    seen.clear()
    with d.attach(pipe, d.ReferenceCache(refresh_every=2)) as attachment:
        made = run(pipe, call)
        (section,) = attachment.report().sections
    left = whole - EDITING[name]
    assert seen == [tokens for tokens in (whole, left, whole, left, whole) for _ in range(forwards)]
    assert section.data == {"tokens": EDITING[name], "left_out": 2 * forwards, "computed": 3 * forwards}
    assert 0 < (made - plain).norm() < 0.05 * plain.norm()
    assert torch.equal(run(pipe, call), plain)


def off(zero_cond_t, layers, *sizes):
    """Return how far a Qwen-Image-Edit's third step is off, the references' keys being those of the first."""
    model, shapes = tiny.MODELS["qwen-image"][1], [(1, 8, 10), *((1, *size) for size in sizes)]

    def inputs(batch):
        latents = torch.randn(batch, sum(height * width for _, height, width in shapes), 4)
        return dict(model.inputs(batch), hidden_states=latents, img_shapes=[shapes] * batch)

    config = dict(model.config, zero_cond_t=zero_cond_t, num_layers=layers)
    cls = model.transformer
    case = Case(adapter_for(cls.__name__), TinyModel(transformer=cls, config=config, inputs=inputs))
    wide, given = case.wide(), wide_inputs(case.inputs(2))
    steps = [dict(given, timestep=torch.full((2,), 1 - 0.3 * step).double()) for step in range(3)]
    plain = case.run(steps[2], 2, transformer=wide)[:, :80]
    with d.attach(wide, d.ReferenceCache(refresh_every=9), preset="none"):
        made = [case.run(inputs, step, transformer=wide) for step, inputs in enumerate(steps)][2][:, :80]
    return float((made - plain).norm() / plain.norm())


def test_keys_are_exact_where_the_model_gives_references_a_fixed_timestep():
    """Qwen-Image-Edit-2511's first layer, also where text stands behind a reference that is larger than the picture."""
    for sizes in ((2, 3),), ((2, 3), (24, 4)):
        assert off(True, 1, *sizes) < 1e-12
        assert off(True, 2, *sizes) > 1e-9
        assert off(False, 1, *sizes) > 1e-9


def test_what_does_not_go_together_is_refused_by_name():
    wan, flux = (
        Case(adapter_for(one.transformer.__name__), one) for one in (tiny.MODELS["wan"][0], tiny.MODELS["flux2"][1])
    )
    with pytest.raises(ConfigError, match=r"referencecache.*wan.*VACE"):
        d.attach(wan.transformer, d.ReferenceCache())
    with pytest.raises(ConfigError, match=r"referencecache.*dbprune"):
        d.attach(flux.transformer, d.ReferenceCache(), d.DBPrune())
    flux.transformer.compile_repeated_blocks()
    with pytest.raises(ConfigError, match="compiled"):
        d.attach(flux.transformer, d.ReferenceCache())
