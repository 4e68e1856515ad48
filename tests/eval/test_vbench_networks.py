"""VBench's networks: against other code of the same ones, by random weights, and wrong or missing files by name."""

import sys
import types
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import open_clip
import pytest
import tiny_vbench as tiny
import torch
from dit_accel_eval.vbench import official, rules, sampling, weight_files
from dit_accel_eval.vbench.measures import WAYS, Means, missing_reason
from dit_accel_eval.vbench.networks import clip, vit
from dit_accel_eval.vbench.networks.loading import Networks
from dit_accel_eval.vbench.prompts import Prompt
from dit_accel_eval.vbench.sampling import Video
from PIL import ImageFile
from torch.nn import functional as F

from dit_accel import ConfigError

needs_package = pytest.mark.skipif(official.missing() is not None, reason=str(official.missing()))


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_dino_is_that_of_transformers_where_the_grid_is_the_trained_one():
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=256,
                       image_size=64, layer_norm_eps=1e-6)  # fmt: skip
    other = ViTModel(config, add_pooling_layer=False).eval()
    weights = tiny.dino(side=4)
    held = other.state_dict()
    held["embeddings.cls_token"], held["embeddings.position_embeddings"] = weights["cls_token"], weights["pos_embed"]
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj",
             "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}  # fmt: skip
    for kind in ("weight", "bias"):
        held[f"embeddings.patch_embeddings.projection.{kind}"] = weights[f"patch_embed.proj.{kind}"]
        held[f"layernorm.{kind}"] = weights[f"norm.{kind}"]
        for block in (0, 1):
            for mine, theirs in names.items():
                held[f"layers.{block}.{theirs}.{kind}"] = weights[f"blocks.{block}.{mine}.{kind}"]
            parts = weights[f"blocks.{block}.attn.qkv.{kind}"].chunk(3)
            for part, value in zip("qkv", parts, strict=True):
                held[f"layers.{block}.attention.{part}_proj.{kind}"] = value
    other.load_state_dict(held)
    frames = tiny.random(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.allclose(
            vit.dino(vit.tower(weights).eval(), frames), other(frames).last_hidden_state[:, 0], atol=1e-5
        )


def test_dino_lays_its_positions_over_other_grids_with_a_tenth_to_be_safe():
    weights = tiny.dino(side=4)
    found = vit._positions(weights["pos_embed"], 4, 6)
    assert found.shape == (1, 1 + 24, 64)
    square = weights["pos_embed"][0, 1:].reshape(4, 4, 64)

    def cubic(distance: float) -> float:  # Keys' kernel, a = -0.75
        d, a = abs(distance), -0.75
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

    def along(place: int, scale: float) -> list[tuple[int, float]]:
        at = (place + 0.5) / scale - 0.5
        low = int(np.floor(at))
        return [(min(max(low + step, 0), 3), cubic(at - low - step)) for step in (-1, 0, 1, 2)]

    for down, right in ((0, 0), (2, 3), (3, 5)):
        expected = sum(
            one * two * square[row, column]
            for row, one in along(down, 4.1 / 4)
            for column, two in along(right, 6.1 / 4)
        )
        assert torch.allclose(found[0, 1 + 6 * down + right], expected, atol=1e-5)


def test_openais_files_fill_clip_as_open_clip_itself_reads_them():
    from open_clip.model import build_model_from_openai_state_dict

    weights = {name: value.half().float() for name, value in tiny.clip(56).items()}
    sizes = {
        "input_resolution": torch.tensor(224),
        "context_length": torch.tensor(77),
        "vocab_size": torch.tensor(49408),
    }
    other, own = build_model_from_openai_state_dict(dict(weights)).float(), clip.openai(weights | sizes).eval()
    frames, tokens = tiny.random(2, 3, 224, 224), open_clip.tokenize(["the red", "a dog's ball, 5 of them"])
    with torch.inference_mode():
        assert torch.allclose(own.encode_image(frames), other.encode_image(frames), atol=1e-5)
        assert torch.allclose(own.encode_text(tokens), other.encode_text(tokens), atol=1e-5)


def test_viclip_adds_its_times_and_looks_at_all_frames_at_once():
    network = clip.viclip(tiny.viclip()).eval()
    frames = tiny.random(8, 3, 224, 224)
    with torch.inference_mode():
        found = clip.clip_video(network, frames)
        assert found.shape == (1, 32)
        assert not torch.allclose(clip.clip_video(network, frames.flip(0)), found, atol=1e-4)
        network.visual.times.zero_()
        there, back = (clip.clip_video(network, one) for one in (frames, frames.flip(0)))
        assert torch.allclose(there, back, atol=1e-5)
        network.visual.times = torch.zeros(1, 1, 64)
        one = clip.clip_video(network, frames[:1])  # a frame without its time is a picture
        assert torch.allclose(one, network.encode_image(frames[:1]), atol=1e-5)


def test_umt_stretches_its_sines_over_16_frames_and_looks_at_the_mean():
    table = vit.sines(8, 2, 6)[0].reshape(8, 4, 6)
    for place in (0, 5, 31):
        for at in range(6):
            angle = place / 10000 ** (2 * (at // 2) / 6)
            expected = np.cos(angle) if at % 2 else np.sin(angle)
            assert table[place // 4, place % 4, at] == pytest.approx(expected, abs=1e-6)
    longer = vit.sines(16, 2, 6)[0].reshape(16, 4, 6)
    assert torch.allclose(longer[3], 0.75 * table[1] + 0.25 * table[2], atol=1e-6)  # (3 + .5) / 2 - .5 = 1.25
    assert torch.allclose(longer[0], table[0], atol=1e-6)
    weights = tiny.umt(classes=7)
    frames = tiny.random(16, 3, 224, 224)
    learned = weights | {"pos_embed": vit.sines(16, 14, 64)}
    with torch.inference_mode():
        own, other = (vit.umt(vit.tower(one).eval(), frames) for one in (weights, learned))
    assert own.shape == (7,)
    assert torch.equal(own, other)


def test_texts_are_cut_into_as_many_tokens_as_are_read():
    red = open_clip.tokenize("the red")
    assert torch.equal(clip.tokens("The  RED", 77), red)
    assert torch.equal(clip.tokens("the red", 32, places=40), red[:, :40])
    assert clip.tokens("red " * 50, 32)[0, -1] == red.max()
    with pytest.raises(ConfigError, match=r"reads 32 tokens.*52"):
        clip.tokens("red " * 50, 32, cut=False)


@pytest.fixture
def networks(tmp_path, monkeypatch) -> Networks:
    tiny.write(tmp_path, monkeypatch, "dino", "umt", "viclip", "clip-b32", "clip-l14", "aesthetic")
    return Networks(tmp_path)


def test_dimensions_of_features_follow_from_the_networks(networks):
    video = Video(name="a-0.mp4", frames=noise(9, 40, 56, 3), fps=8)
    asked = Prompt(text="the red", dimensions=(), targets={"appearance_style": "red"})
    means = Means(networks=networks)
    found = {}
    for name in ("subject_consistency", "background_consistency", "aesthetic_quality", "appearance_style",
                 "overall_consistency"):  # fmt: skip
        assert missing_reason(name, means) is None
        score = WAYS[name].measure(video, asked, means)
        assert score is not None
        found[name] = float(score.value)
    held = {name: weight_files.read(name, networks.folder) for name in ("dino", "clip-b32", "clip-l14", "viclip",
            "aesthetic")}  # fmt: skip
    dino = vit.tower(held["dino"]).eval()
    small, large = (clip.openai(held[name]).eval() for name in ("clip-b32", "clip-l14"))
    viclip = clip.viclip(held["viclip"]).eval()
    with torch.inference_mode():
        features = F.normalize(vit.dino(dino, sampling.for_dino(video.frames)).double(), dim=1)
        seen = F.normalize(large.encode_image(sampling.for_clip(video.frames)), dim=1)
        look = F.normalize(small.encode_image(sampling.for_clip_pictures(video.frames)), dim=1)
        style = F.normalize(small.encode_text(open_clip.tokenize("red")), dim=1)
        chosen = sampling.for_clip(video.frames[[0, 1, 2, 3, 4, 5, 6, 7]], rounded=True)  # 9 frames: 8 stretches
        whole = F.normalize(clip.clip_video(viclip, chosen), dim=1)
        text = F.normalize(viclip.encode_text(open_clip.tokenize("the red")), dim=1)
    alike = features @ features.T
    pairs = [max(0.0, float(alike[at, at - 1])) / 2 + max(0.0, float(alike[at, 0])) / 2 for at in range(1, 9)]
    assert found["subject_consistency"] == pytest.approx(np.mean(pairs), abs=1e-6)
    head = held["aesthetic"]
    assert found["aesthetic_quality"] == pytest.approx(
        float((seen @ head["weight"][0] + head["bias"]).mean() / 10), abs=1e-6
    )
    assert found["appearance_style"] == pytest.approx(float((look @ style.T).mean()), abs=1e-6)
    assert found["overall_consistency"] == pytest.approx(float(whole @ text.T), abs=1e-6)


def test_a_still_video_is_wholly_consistent(networks):
    video = Video(name="a-0.mp4", frames=noise(1, 40, 56, 3).repeat(4, 0), fps=8)
    for name in ("subject_consistency", "background_consistency"):
        score = WAYS[name].measure(video, Prompt(text="", dimensions=()), Means(networks=networks))
        assert score is not None
        assert score.value == pytest.approx(1, abs=1e-6)


def test_long_texts_are_cut_for_viclip_and_refused_for_clip(networks):
    long = " ".join(["the"] * 80)
    assert networks.viclip_words(long).shape == (1, 32)
    assert torch.equal(networks.viclip_words(long), networks.viclip_words(long + " red"))
    with pytest.raises(ConfigError, match=r"CLIP.*77 tokens.*82"):
        networks.clip_words("clip-b32", long)


def test_missing_and_wrong_files_are_told_by_name(networks, monkeypatch):
    path = networks.folder / weight_files.WEIGHT_FILES["dino"].path
    frames = sampling.for_dino(noise(2, 224, 224, 3))
    one = weight_files.WEIGHT_FILES["dino"]
    monkeypatch.setitem(weight_files.WEIGHT_FILES, "dino", replace(one, sha256="0123"))
    with pytest.raises(ConfigError, match=r"SHA-256 \w{64}.*expected was 0123\.\.\."):
        networks.dino(frames)
    monkeypatch.setitem(weight_files.WEIGHT_FILES, "dino", replace(one, sha256=""))
    path.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"dino_vitbase16_pretrain\.pth.*as weights"):
        networks.dino(frames)
    torch.save({"cls_token": torch.zeros(1)}, path)
    with pytest.raises(ConfigError, match=r"lacks 'patch_embed.proj.weight'"):
        networks.dino(frames)
    path.unlink()
    with pytest.raises(ConfigError, match=r"dino.*https://dl.fbaipublicfiles.com/.*dino_model"):
        Networks(networks.folder).dino(frames)


def test_what_cannot_be_measured_says_what_to_put_where(tmp_path):
    means = Means(networks=Networks(tmp_path))
    for name, way in WAYS.items():
        reason = missing_reason(name, means)
        if name == "temporal_flickering":
            assert reason is None
        elif way.networks:
            assert all(str(tmp_path / weight_files.WEIGHT_FILES[one].path) in str(reason) for one in way.networks)
        else:
            assert "bring them with --observations" in str(reason)


@pytest.mark.skipif(find_spec("cv2") is None, reason="UMT's frames are sized by OpenCV, which is not installed")
def test_actions_are_umts_by_name(networks, monkeypatch):
    names = [f"action {number}" for number in range(400)]
    monkeypatch.setattr(official, "actions", lambda: names)
    frames = noise(40, 60, 80, 3)
    held = weight_files.read("umt", networks.folder)
    chosen = sampling.for_umt(frames[sampling.middle(40, 16)])
    assert chosen.shape == (16, 3, 224, 224)
    with torch.inference_mode():
        likely = torch.sigmoid(vit.umt(vit.tower(held).eval(), chosen))
    best, last = int(likely.argmax()), int(likely.argmin())
    for place, right in ((best, bool(round(float(likely[best]), 4) >= rules.SURE)), (last, False)):
        video = Video(name=f"A person is action {place}-0.mp4", frames=frames, fps=8)
        score = WAYS["human_action"].measure(video, Prompt(text="", dimensions=()), Means(networks=networks))
        assert score == rules.VideoScore(value=right, more={"cor_num_per_video": int(right)})
    with torch.no_grad():
        networks._made("umt", vit.tower).head.bias[last] = 50
    video = Video(name=f"A person is action {last}-0.mp4", frames=frames, fps=8)
    score = WAYS["human_action"].measure(video, Prompt(text="", dimensions=()), Means(networks=networks))
    assert score is not None
    assert score.value is True


def test_imaging_quality_is_the_mean_of_what_musiq_says_of_frames(tmp_path, monkeypatch):
    asked = []

    class MUSIQ(torch.nn.Module):
        def __init__(self, pretrained_model_path):
            super().__init__()
            asked.append(pretrained_model_path)

        def forward(self, frame):
            asked.append(tuple(frame.shape))
            return 100 * frame.mean().reshape(1, 1)

    monkeypatch.setitem(sys.modules, "pyiqa", types.ModuleType("pyiqa"))
    monkeypatch.setitem(sys.modules, "pyiqa.archs", types.ModuleType("pyiqa.archs"))
    monkeypatch.setitem(sys.modules, "pyiqa.archs.musiq_arch", types.ModuleType("pyiqa.archs.musiq_arch"))
    monkeypatch.setattr(sys.modules["pyiqa.archs.musiq_arch"], "MUSIQ", MUSIQ, raising=False)
    one = weight_files.WEIGHT_FILES["musiq"]
    (tmp_path / one.path).parent.mkdir(parents=True)
    (tmp_path / one.path).write_bytes(b"weights")
    monkeypatch.setitem(weight_files.WEIGHT_FILES, "musiq", replace(one, sha256=""))
    frames = np.stack([np.full((20, 1024, 3), level, np.uint8) for level in (51, 102)])
    video = Video(name="a-0.mp4", frames=frames, fps=8)
    means = Means(networks=Networks(tmp_path))
    score = WAYS["imaging_quality"].measure(video, Prompt(text="", dimensions=()), means)
    assert score is not None
    assert score.value == pytest.approx(30)  # of 20 and 40; the mean over videos is divided by 100
    assert WAYS["imaging_quality"].scale == 100
    assert asked == [str(tmp_path / one.path), (1, 3, 10, 512), (1, 3, 10, 512)]
    monkeypatch.setitem(weight_files.WEIGHT_FILES, "musiq", one)
    with pytest.raises(ConfigError, match=r"expected was 358bb6af\.\.\."):
        Networks(tmp_path).musiq(sampling.for_musiq(frames))


@needs_package
@pytest.mark.skipif(find_spec("scipy") is None, reason="RAFT's code imports SciPy, which is not installed")
def test_raft_and_amt_run_by_the_official_code(tmp_path, monkeypatch):
    torch.manual_seed(0)
    raft = official.module("RAFT.core.raft")
    amt = official.module("amt.networks.AMT-S")
    options = type("Options", (dict,), {"__getattr__": dict.__getitem__, "__setattr__": dict.__setitem__})
    made = {
        "raft": {f"module.{key}": value for key, value in raft.RAFT(
            options(small=False, mixed_precision=False, alternate_corr=False)).state_dict().items()},
        "amt": {"state_dict": amt.Model(corr_radius=3, corr_lvls=4, num_flows=3).state_dict()},
    }  # fmt: skip
    for name, held in made.items():
        path = tmp_path / weight_files.WEIGHT_FILES[name].path
        path.parent.mkdir(parents=True)
        torch.save(held, path)
    networks = Networks(tmp_path)
    one, two, three = (sampling.tensor(noise(1, 124, 130, 3, seed=seed))[0] for seed in range(3))
    monkeypatch.setattr("dit_accel_eval.vbench.networks.loading.RAFT_ROUNDS", 1)
    flow = networks.raft(one, two)
    assert flow.shape == (2, 128, 136)  # padded to eighths, and left so
    assert flow.isfinite().all()
    drawn = networks.amt(one / 255, two / 255)
    assert drawn.shape == (3, 124, 130)
    assert drawn.isfinite().all()
    for network, name in ((networks.raft, "RAFT"), (networks.amt, "AMT")):
        with pytest.raises(ConfigError, match=rf"{name}.*128 pixels.*(112|120)"):
            network(one[:, :112], two[:, :112])
    frames = torch.stack([one, three, two]).permute(0, 2, 3, 1).byte().numpy()
    score = WAYS["motion_smoothness"].measure(
        Video(name="a-0.mp4", frames=frames, fps=8), Prompt(text="", dimensions=()), Means(networks=networks)
    )
    apart = ((drawn * 255).clamp(0, 255).floor() - three).abs().mean()
    assert score == rules.VideoScore(value=pytest.approx(float(1 - apart / 255), abs=1e-6))


@needs_package
def test_the_official_package_leaves_no_trace_among_the_modules():
    official.module.cache_clear()
    official.module("amt.networks.AMT-S")
    assert not ImageFile.LOAD_TRUNCATED_IMAGES  # its code would have cut-off pictures read
    assert not [name for name in sys.modules if name.partition(".")[0] == "vbench"]
    assert len(official.actions()) == 400
