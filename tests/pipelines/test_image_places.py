"""Where image tokens lie in calls that the checks do not make: reference images, caches, padding, ragged batches."""

import dataclasses
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import tiny_image_models as tiny
import tiny_models
import torch
from dit_accel_pipelines.families.all_families import IMAGES
from torch import Tensor

import dit_accel
from dit_accel import ConfigError
from dit_accel.adapters import position_ids as positions
from dit_accel.testing.everything import planned
from dit_accel.testing.method_cases import METHOD_CASES
from dit_accel.testing.recording import recorded, require_same, require_text_exact

SOL = METHOD_CASES["sol"]
ADAPTERS = {adapter.name: adapter for adapter in IMAGES}
Grids = list[tuple[int, ...]]


def build(model: Any) -> Any:
    torch.manual_seed(0)
    return model.transformer(**model.config).eval()


def forward(transformer: Any, inputs: dict[str, Any]) -> Any:
    with torch.no_grad():
        return transformer(**inputs, return_dict=False)


def doubled(value: Any) -> Any:
    """Return inputs in float64."""
    if isinstance(value, dict):
        return {key: doubled(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(doubled(item) for item in value)
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def assert_planned_is_dense(name: str, transformer: Any, run: Callable[[Any], list[Tensor]]) -> Grids:
    """All tiles kept gives what the untouched model gives; thinned out, text stays exact. Returns the calls' grids:
    frames, height, width, text before and text after.
    """
    transformer = transformer.double()
    expected = run(transformer)
    with planned(transformer, ADAPTERS[name]) as attachment, recorded(attachment) as calls:
        for planned_output, plain in zip(run(transformer), expected, strict=True):
            require_same(planned_output, plain, name)
    with dit_accel.attach(transformer, SOL.active) as attachment, recorded(attachment) as thinned:
        assert not torch.equal(run(transformer)[-1], expected[-1])
    assert len(thinned) == len(calls) > 0
    for call in thinned:
        require_text_exact(call)
    assert torch.equal(run(transformer)[-1], expected[-1])
    return [dataclasses.astuple(call.context.layout) for call in calls]


def grids_of_planned(name: str, transformer: Any, inputs: dict[str, Any], start: int = 0) -> Grids:
    """Require of one call what `assert_planned_is_dense` does, of its tokens from ``start`` on."""
    return assert_planned_is_dense(name, transformer, lambda model: [forward(model, inputs)[0][:, start:]])


def test_a_raster_is_read_off_either_end():
    both = torch.cat([tiny.ids(), tiny.ids(2, 3, 1), tiny.ids(3, 2, 2)])
    assert positions.first_image(both) == (8, 10)
    assert positions.last_image(both) == (3, 2)
    assert positions.first_image(both.expand(2, -1, -1)) == (8, 10)
    assert positions.last_row(torch.cat([torch.zeros(6, 3), tiny.ids()])) == 10
    assert positions.first_image(tiny.ids()[torch.tensor([0, 2, 1, *range(3, 80)])]) == (1, 80)
    assert positions.first_image(tiny.ids()[:78]) == (1, 78)


def test_values_are_read_once_as_long_as_they_stay():
    seen = []

    def read(ids: Tensor) -> int:
        seen.append(ids.sum())
        return len(seen)

    ids = tiny.ids()
    assert [positions.read_once(ids, read) for _ in range(3)] == [1, 1, 1]
    ids += 1
    assert positions.read_once(ids, read) == 2
    assert positions.read_once(ids.clone(), read) == 3
    with torch.inference_mode():
        assert positions.read_once(tiny.ids(), read) == 4


def test_a_reference_image_behind_the_image_counts_as_text():
    for name in ("flux", "flux-kin", "flux2", "chroma", "bria-fibo"):
        model = tiny_models.MODELS[name][0]
        inputs = doubled(model.inputs(1))
        more = tiny.packed(1, references=True, columns=inputs["img_ids"].shape[-1])
        inputs |= doubled({key: more[key] for key in ("hidden_states", "img_ids")})
        if "attention_mask" in inputs:
            inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones(1, 6, dtype=torch.bool)], 1)
        inputs.pop("joint_attention_kwargs", None)
        assert {*grids_of_planned(name, build(model), inputs)} == {(1, 8, 10, 6, 6)}


def test_flux2_fills_and_reads_its_cache_of_references():
    inputs = doubled(tiny.FLUX2[0].inputs(2))
    both = {
        **inputs,
        "hidden_states": torch.cat([torch.randn(2, 6, 4).double(), inputs["hidden_states"]], 1),
        "img_ids": torch.cat([tiny.ids(2, 3, 10, 4).expand(2, -1, -1), inputs["img_ids"]], 1),
    }
    transformer = build(tiny.FLUX2[0])
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.attn.set_processor(block.attn._available_processors[1]())

    def run(transformer: Any) -> list[Tensor]:
        first, cache = forward(transformer, dict(both, kv_cache_mode="extract", num_ref_tokens=6))
        return [first, forward(transformer, dict(inputs, kv_cache_mode="cached", kv_cache=cache))[0]]

    grids = assert_planned_is_dense("flux2", transformer, run)
    assert grids == [(1, 8, 10, 12, 0)] * 8  # one planned call a layer, the references' own stay dense


def test_glm_image_fills_and_reads_its_cache_of_references():
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    inputs = doubled(tiny.GLM_IMAGE[0].inputs(2))
    reference = {
        **{key: value[:1] for key, value in inputs.items()},
        "hidden_states": torch.randn(1, 4, 4, 6).double(),
        "encoder_hidden_states": inputs["encoder_hidden_states"][:1, :0],
        "prior_token_id": torch.arange(6)[None],
        "prior_token_drop": torch.zeros(1, 6, dtype=torch.bool),
    }

    def run(transformer: Any) -> list[Tensor]:
        caches, outputs = GlmImageKVCache(3), []
        for mode, call in (("write", reference), ("read", inputs), ("skip", inputs)):
            caches.set_mode(mode)
            outputs.append(forward(transformer, dict(call, kv_caches=caches))[0])
        return outputs

    grids = assert_planned_is_dense("glm-image", build(tiny.GLM_IMAGE[0]), run)
    assert grids == [(1, 8, 10, 12, 0)] * 3 + [(1, 8, 10, 6, 0)] * 3  # the cache is filled densely


def test_qwen_image_21_plans_the_image_with_and_without_its_cache():
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    def run(transformer: Any) -> list[Tensor]:
        cache = QwenImage21KVCache(3)
        calls = [{}, dict(kv_cache=cache, kv_cache_mode="extract"), dict(kv_cache=cache, kv_cache_mode="cached")]
        return [forward(transformer, {**inputs, **call})[0][:, -80:] for call in calls]

    for references in (False, True):
        inputs = doubled(tiny.qwen_image_21(2, references))
        grids = assert_planned_is_dense("qwen-image-2.1", build(tiny.QWEN_IMAGE_21[0]), run)
        assert grids == [(1, 8, 10, 6 + 8 * references, 0)] * 9


def z_image_omni(rows: list[tuple[int, int]]) -> dict[str, Any]:
    """Rows of (first prompt's tokens, text features): a reference image, a missing SigLIP image, the image."""
    return dict(
        x=[[torch.randn(4, 1, 4, 6).double(), torch.randn(4, 1, 16, 20).double()] for _ in rows],
        t=torch.full((len(rows),), 0.5).double(),
        cap_feats=[[torch.randn(tokens, 16).double() for tokens in row] for row in rows],
        siglip_feats=[[torch.randn(3, 4, 8).double(), None] for _ in rows],
        image_noise_mask=[[0, 1] for _ in rows],
    )


def test_z_image_omni_counts_text_and_earlier_images_in_front():
    torch.manual_seed(0)
    transformer = diffusers.ZImageTransformer2DModel(**tiny.Z_IMAGE[0].config, siglip_feat_dim=8).eval()
    inputs = z_image_omni([(6, 5), (7, 4)])
    grids = assert_planned_is_dense("z-image", transformer, lambda transformer: list(forward(transformer, inputs)[0]))
    assert set(grids) == {(1, 8, 10, 32 + 32 + 32, 16 + 32 + 32)}
    ragged = z_image_omni([(6, 5), (40, 4)])
    plain = forward(transformer, ragged)[0]
    with dit_accel.attach(transformer, preset="none"):
        assert all(map(torch.equal, forward(transformer, ragged)[0], plain))
    with dit_accel.attach(transformer, SOL.active), pytest.raises(ConfigError, match=r"z-image\).*rows.*lengths"):
        forward(transformer, ragged)


def test_what_an_adapter_can_not_place_stays_dense_and_is_refused_where_a_method_would_thin_it_out():
    lumina, joyimage, hidream, chroma = tiny.LUMINA2[0], tiny.JOYIMAGE_EDIT_PLUS[0], tiny.HIDREAM[0], tiny.CHROMA[0]
    sizes = joyimage.inputs(2)["shape_list"]
    sizes[1] = [(1, 10, 8), (1, 2, 3)]
    patches = dict(
        hidden_states=torch.randn(1, 80, 16), img_ids=tiny.ids()[None], img_sizes=[(8, 10)],
        hidden_states_masks=torch.ones(1, 80),
    )  # fmt: skip
    numbers = chroma.inputs(1)["attention_mask"].float()
    for model, rows, changes, match in (
        (lumina, 2, dict(encoder_attention_mask=tiny.text_mask(2)), r"lumina2\).*own prompt \(\(5, 4\) tokens\)"),
        (joyimage, 2, dict(shape_list=sizes), r"joyimage-edit-plus\).*this call: .*images.*sizes, \[\("),
        (hidream, 1, patches, r"hidream\).*this call: .*patches already.*positions"),
        (chroma, 1, dict(attention_mask=numbers), r"biases.*0 and -1"),
    ):
        transformer, inputs = build(model), {**model.inputs(rows), **changes}
        plain = forward(transformer, inputs)[0]
        for methods in ((), () if model is chroma else (SOL.neutral,)):
            with dit_accel.attach(transformer, *methods, preset="none"):
                assert torch.equal(forward(transformer, inputs)[0], plain)
        with dit_accel.attach(transformer, SOL.active), pytest.raises(ConfigError, match=match):
            forward(transformer, inputs)


def test_tokens_beside_the_image_are_counted_where_they_stand():
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    joyimage, ideogram = tiny.JOYIMAGE_EDIT[0], tiny.IDEOGRAM4[0]
    grids = grids_of_planned("joyimage-edit", build(joyimage), doubled(tiny.joyimage(2, items=3)))
    assert {*grids} == {(1, 8, 10, 0, 2 * 80 + 6)}
    grids = grids_of_planned("ideogram4", build(ideogram), doubled(tiny.ideogram4(2, padding=5)), start=11)
    assert {*grids} == {(1, 8, 10, 11, 0)}  # its padding is hidden
    inputs = {key: value if key == "timestep" else value[:, 6:] for key, value in doubled(tiny.ideogram4(1)).items()}
    assert {*grids_of_planned("ideogram4", build(ideogram), inputs)} == {(1, 8, 10, 0, 0)}  # its second transformer
    inputs = doubled(tiny.bria_fibo_2(2))
    inputs["encoder_attention_mask"] = torch.arange(6)[None] < torch.tensor([[6], [3]])
    grids = grids_of_planned("bria-fibo-2", build(tiny.BRIA_FIBO_2[0]), inputs)
    assert {grid[:4] for grid in grids} == {(1, 8, 10, 0)}
    assert grids[0][4] > 2  # padded gist tokens are last
    transformer = build(tiny_models.FLUX[0])
    for block in transformer.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(32, 12))
    inputs = doubled(tiny_models.FLUX[0].inputs(1))
    inputs["joint_attention_kwargs"] = {"ip_hidden_states": [torch.randn(1, 4, 12).double()]}
    assert grids_of_planned("flux", transformer, inputs) == [(1, 8, 10, 6, 0)] * 4


@pytest.mark.slow
def test_a_transformer_compiled_whole_stays_dense_or_says_why():
    model = tiny_models.FLUX[0]
    transformer, inputs = build(model), model.inputs(1)
    plain = forward(transformer, inputs)[0]
    compiled = torch.compile(transformer, backend="eager", fullgraph=True)
    with dit_accel.attach(transformer, preset="none"):
        torch.testing.assert_close(forward(compiled, inputs)[0], plain)
    torch._dynamo.reset()
    with (
        dit_accel.attach(transformer, SOL.active),
        transformer.cache_context("cond", step_index=0, num_inference_steps=2),
        pytest.raises(ConfigError, match=r"flux\).*tokens' positions.*tensor values"),
    ):
        forward(compiled, inputs)
    torch._dynamo.reset()
