"""The block that attaches methods inside a modular pipeline, before its blocks denoise."""

import pytest
import torch
from diffusers.modular_pipelines import SequentialPipelineBlocks
from tiny_stock import stock_pipeline

import dit_accel
from dit_accel import AttachError, ConfigError, EasyCache
from dit_accel.serving.modular import AttachMethods

SETTING = "[easycache]\nthreshold = 1e9\nwarmup_steps = 1\nmax_consecutive = 1\n"


@pytest.fixture(params=["WanModularPipeline", "FluxModularPipeline"])
def made(request, tmp_path):
    """A pipeline with the block in front, its call without the setting, and the path of a setting."""
    (tmp_path / "cache.toml").write_text(SETTING)
    pipe, call = stock_pipeline(request.param)
    blocks = pipe.blocks
    blocks.sub_blocks.insert("dit_accel", AttachMethods("none"), 0)
    with_block = type(pipe)(blocks=blocks)
    with_block.update_components(**{name: part for name, part in pipe.components.items() if part is not None})
    if not hasattr(with_block, "vae"):
        with_block.vae = pipe.vae  # which tells the latents' scale
    call = {**call, "num_inference_steps": 4}
    return with_block, lambda **more: with_block(**call, **more, generator=torch.Generator().manual_seed(0)), tmp_path


def test_each_call_has_the_setting_that_it_names_and_what_others_attached_stays(made):
    pipe, run, folder = made
    path, plain = str(folder / "cache.toml"), run()
    assert dit_accel.attachment_of(pipe) is None
    cached = run(dit_accel=path)
    attachment = dit_accel.attachment_of(pipe)
    assert list(attachment.report().methods) == ["easycache"]
    assert not torch.equal(cached, plain)
    assert torch.equal(run(dit_accel=path), cached)
    assert dit_accel.attachment_of(pipe) is attachment
    run(dit_accel="careful")
    assert dit_accel.attachment_of(pipe) is not attachment
    assert torch.equal(run(dit_accel="none"), plain)
    assert dit_accel.attachment_of(pipe) is None
    with dit_accel.attach(pipe, EasyCache()) as own:
        with pytest.raises(AttachError, match="transformer"):
            run(dit_accel="careful")
        assert dit_accel.attachment_of(pipe) is own
    with pytest.raises(ConfigError, match="'swift'"):
        run(dit_accel="swift")


def test_alone_it_expects_the_transformers_that_it_is_told():
    class Attaching(SequentialPipelineBlocks):
        model_name = "wan"
        block_classes = (AttachMethods,)
        block_names = ("dit_accel",)

    assert not Attaching().expected_components
    named = AttachMethods("fast", ("transformer", "transformer_2"))
    assert [one.name for one in named.expected_components] == ["transformer", "transformer_2"]
    assert [one.name for one in named.inputs] == ["dit_accel"]
    assert "transformers" in named.description
