"""Inception, I3D, PickScore and HPSv2: loaded from files of random weights of the same interface."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import tiny_inception
import torch
from dit_accel_eval.vbench import sampling, weight_files
from dit_accel_eval.vbench.networks import clip as networks_clip
from dit_accel_eval.vbench.networks import inception
from dit_accel_eval.vbench.networks.loading import Networks
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dit_accel import ConfigError


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def place(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> Path:
    """Return where a file of weights lies, whose hash may be any."""
    one = replace(weight_files.WEIGHT_FILES[name], sha256="")
    monkeypatch.setitem(weight_files.WEIGHT_FILES, name, one)
    (folder / one.path).parent.mkdir(parents=True, exist_ok=True)
    return folder / one.path


def test_inceptions_convolutions_are_as_many_as_published():
    # Keras tells 23,851,784 numbers: 2,049,000 of the last layer, 34,432 running ones, 17,216 biases of norms, no scale
    shapes = list(tiny_inception.convolutions())
    assert len(shapes) == 94
    assert sum(narrow for _, _, narrow, _, _ in shapes) == 17_216
    assert sum(wide * narrow * high * across for _, wide, narrow, high, across in shapes) == 21_751_136


def test_inception_fills_a_network_with_all_its_weights_and_only_those(tmp_path, monkeypatch):
    held = tiny_inception.weights()
    network, frames = inception.network(held).eval(), noise(2, 40, 56, 3)
    own = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
    assert own.keys() == held.keys()
    with torch.inference_mode():
        found = inception.inception(network, sampling.tensor(frames) / 255)
    assert found.shape == (2, 2048)
    assert found.std() > 0.01
    torch.save(held | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)},
               place(tmp_path, monkeypatch, "inception"))  # fmt: skip
    assert torch.allclose(Networks(tmp_path).inception(frames), found, atol=1e-4)
    del held["Mixed_7c.branch1x1.conv.weight"]
    torch.save(held, place(tmp_path, monkeypatch, "inception"))
    with pytest.raises(ConfigError, match=r"Mixed_7c\.branch1x1\.conv\.weight"):
        Networks(tmp_path).inception(frames)


def test_inceptions_averages_leave_the_padding_out_and_its_last_block_takes_the_maximum():
    x = torch.arange(9.0).reshape(1, 1, 3, 3)
    assert inception.average(x)[0, 0].tolist() == [[2.0, 2.5, 3.0], [3.5, 4.0, 4.5], [5.0, 5.5, 6.0]]
    network = inception.network(tiny_inception.weights()).eval()
    given: dict[str, Tensor] = {}
    for name in ("Mixed_5c", "Mixed_7b", "Mixed_7c"):
        block = getattr(network, name)
        block.register_forward_pre_hook(lambda module, inputs, name=name: given.update({name: inputs[0]}))
        block.branch_pool.conv.register_forward_pre_hook(
            lambda module, inputs, name=name: given.update({f"{name} pooled": inputs[0]})
        )
    with torch.inference_mode():
        inception.inception(network, torch.rand(1, 3, 80, 80))
    for name, pool in (("Mixed_5c", inception.average), ("Mixed_7b", inception.average)):
        assert torch.equal(given[f"{name} pooled"], pool(given[name]))
    assert torch.equal(given["Mixed_7c pooled"], F.max_pool2d(given["Mixed_7c"], 3, 1, 1))


class Logits(nn.Module):
    """An I3D of the published file's interface: the mean by colour and time, 400 of them, if asked for right."""

    def forward(self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False) -> Tensor:
        if rescale or resize or not return_features:
            return torch.zeros(1)
        return x.mean((3, 4)).flatten(1)[:, :30].repeat(1, 14)[:, :400]


def test_i3d_gets_clips_of_224_pixels_in_minus_1_to_1(tmp_path, monkeypatch):
    torch.jit.save(torch.jit.script(Logits()), place(tmp_path, monkeypatch, "i3d"))
    frames = noise(10, 40, 56, 3)
    found = Networks(tmp_path).i3d(frames)
    assert found.shape == (1, 400)
    sized = F.interpolate(torch.from_numpy(frames).permute(0, 3, 1, 2).float(), (224, 224), mode="bilinear")
    expected = (sized / 127.5 - 1).mean((2, 3)).T.flatten()  # by colour, then time
    assert torch.allclose(found[0, :30], expected, atol=1e-4)
    with pytest.raises(ConfigError, match=r"I3D.*10 frames.*9"):
        Networks(tmp_path).i3d(frames[:9])
    place(tmp_path, monkeypatch, "i3d").write_bytes(b"none")
    with pytest.raises(ConfigError, match="TorchScript"):
        Networks(tmp_path).i3d(frames)


@pytest.fixture(scope="module")
def clip() -> nn.Module:
    """A CLIP of ViT-H/14's form, one head a tower, by transformers."""
    from transformers import CLIPConfig, CLIPModel

    tower = {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_act": "gelu"}
    torch.manual_seed(0)
    config = CLIPConfig(
        projection_dim=32,
        vision_config=tower | {"hidden_size": 80, "intermediate_size": 320, "patch_size": 56, "image_size": 224},
        text_config=tower | {"hidden_size": 64, "intermediate_size": 256, "vocab_size": 49408, "eos_token_id": 49407},
    )
    return CLIPModel(config).eval()


def cosines(clip, frames: Tensor, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        seen = clip.visual_projection(clip.vision_model(frames).pooler_output)
        read = clip.text_projection(clip.text_model(tokens).pooler_output)
    return (F.normalize(seen, dim=1) @ F.normalize(read, dim=1).T)[:, 0]


def test_pickscore_is_transformers_logit(clip, tmp_path, monkeypatch):
    tokens = open_clip.tokenize("the red")
    save_file({name: value.contiguous() for name, value in clip.state_dict().items()},
              place(tmp_path, monkeypatch, "pickscore"))  # fmt: skip
    frames = noise(3, 60, 97, 3)
    given = sampling.for_pickscore(frames)
    scale = clip.logit_scale.detach().exp()
    expected = float((scale * cosines(clip, given, tokens)).mean())
    assert Networks(tmp_path).pickscore(frames, "the red") == pytest.approx(expected, rel=1e-4)
    assert abs(expected) > 1e-3


def test_hpsv2_is_the_cosine_of_whole_frames_on_black_squares(clip, tmp_path, monkeypatch):
    tokens = open_clip.tokenize("the red")
    torch.save({"epoch": 1, "state_dict": networks_clip.huge(clip.state_dict()).state_dict()},
               place(tmp_path, monkeypatch, "hpsv2"))  # fmt: skip
    frames = noise(2, 60, 97, 3)
    found = Networks(tmp_path).hpsv2(frames, "the red")
    assert found == pytest.approx(float(cosines(clip, sampling.for_hps(frames), tokens).mean()), rel=1e-4)


def test_pictures_are_sized_as_each_judge_has_it():
    from transformers import CLIPImageProcessor

    frames = noise(1, 60, 97, 3)
    given = CLIPImageProcessor(size={"shortest_edge": 224}, crop_size=224)(Image.fromarray(frames[0]),
                                                                           return_tensors="pt")  # fmt: skip
    assert torch.allclose(sampling.for_pickscore(frames), given["pixel_values"], atol=0.06)
    square = sampling.for_hps(frames)
    assert square.shape == (1, 3, 224, 224)
    height = round(60 * 224 / 97)
    black = -torch.tensor(sampling.CLIP[0]) / torch.tensor(sampling.CLIP[1])
    above, below = (224 - height) // 2, 224 - height - (224 - height) // 2
    for rows in (square[0, :, :above], square[0, :, 224 - below :]):
        assert torch.allclose(rows, black[:, None, None].expand_as(rows), atol=1e-6)
    assert not torch.allclose(square[0, :, above], black[:, None].expand(3, 224), atol=0.1)


def test_a_picture_model_by_another_name_is_told(tmp_path, monkeypatch):
    torch.save({"state_dict": {"a": torch.zeros(1)}}, place(tmp_path, monkeypatch, "hpsv2"))
    with pytest.raises(ConfigError, match=r"lacks .visual\.conv1\.weight."):
        Networks(tmp_path).hpsv2(noise(1, 60, 97, 3), "the red")


def test_setup_lists_them():
    listed = weight_files.WEIGHT_FILES
    assert listed["inception"].sha256 == "6726825d"
    for name in ("i3d", "hpsv2", "pickscore"):
        assert listed[name].hub is not None
        assert listed[name].source == "https://huggingface.co/{}/resolve/main/{}".format(*listed[name].hub)
    assert str(weight_files.absent("dinov2", Path("weights"))).startswith("dinov2 is missing: put https://dl.fbai")
