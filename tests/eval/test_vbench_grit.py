"""GRiT: its pieces against loops and transformers' ViTDet, the whole against the official code, and its dimensions."""

import json
import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tiny_captioners as tiny
import torch
from dit_accel_eval.vbench import rules, sampling, weight_files
from dit_accel_eval.vbench.measures import WAYS, Means, missing_reason
from dit_accel_eval.vbench.networks import bert, boxes, grit, ported
from dit_accel_eval.vbench.networks.loading import Networks
from dit_accel_eval.vbench.prompts import Prompt
from dit_accel_eval.vbench.sampling import Video
from torch import Tensor

from dit_accel import ConfigError

WORDS = tiny.words()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def some_boxes(count: int, width: float, height: float, seed: int = 0) -> Tensor:
    """Return boxes of all sizes, some of them beyond the edges, and one without area."""
    rng = np.random.default_rng(seed)
    middle = rng.uniform((0, 0), (width, height), (count, 2))
    half = rng.uniform(0.1, 0.4, (count, 2)) * (width, height) * rng.choice([0.1, 0.5, 1.0], (count, 1))
    found = torch.tensor(np.concatenate([middle - half, middle + half], 1), dtype=torch.float32)
    found[-1, 2:] = found[-1, :2]
    return found


def plain_overlap(one: list[float], other: list[float]) -> float:
    wide, high = (max(0.0, min(one[at + 2], other[at + 2]) - max(one[at], other[at])) for at in (0, 1))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return wide * high / (areas - wide * high)


@pytest.mark.parametrize("most", [0.1, 0.5, 0.9])
def test_the_best_of_boxes_that_overlap_are_kept(most):
    found, scores = some_boxes(60, 90, 70)[:-1], torch.rand(59, generator=torch.Generator().manual_seed(1))
    expected: list[int] = []
    for place in scores.argsort(descending=True).tolist():
        if all(plain_overlap(found[place].tolist(), found[other].tolist()) <= most for other in expected):
            expected.append(place)
    assert boxes.best(found, scores, most).tolist() == expected
    assert boxes.best(found[:0], scores[:0], most).tolist() == []


def plain_cells(seen: Tensor, box: list[float], scale: float, side: int) -> Tensor:
    """Return the means of a box's cells by the definition of ROIAlign, sample by sample."""
    depth, height, width = seen.shape
    left, top, right, bottom = (edge * scale - 0.5 for edge in box)
    counts = [math.ceil((bottom - top) / side), math.ceil((right - left) / side)]
    found = torch.zeros(depth, side, side)

    def value(y: float, x: float) -> Tensor:
        if y < -1 or y > height or x < -1 or x > width:
            return torch.zeros(depth)
        y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
        low, near = int(y), int(x)
        high, far = min(low + 1, height - 1), min(near + 1, width - 1)
        down, along = y - low, x - near
        upper = (1 - along) * seen[:, low, near] + along * seen[:, low, far]
        return (1 - down) * upper + down * ((1 - along) * seen[:, high, near] + along * seen[:, high, far])

    for row in range(side):
        for column in range(side):
            for i in range(counts[0]):
                for j in range(counts[1]):
                    y = top + (row + (i + 0.5) / counts[0]) * (bottom - top) / side
                    x = left + (column + (j + 0.5) / counts[1]) * (right - left) / side
                    found[:, row, column] += value(y, x) / (counts[0] * counts[1])
    return found


def test_boxes_are_looked_into_cell_by_cell_at_the_level_of_their_size():
    levels = [tiny.random(1, 3, 896 // stride, 1216 // stride, seed=stride) for stride in (8, 16, 32)]
    given = some_boxes(24, 1216, 896)
    found = boxes.looked_into(levels, (8, 16, 32), given, 3)
    used = set()
    for box, cells in zip(given.tolist(), found, strict=True):
        size = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
        level = 0 if size < 224 else 1 if size < 448 else 2
        used.add(level)
        expected = plain_cells(levels[level][0], box, 1 / (8 << level), 3)
        assert torch.allclose(cells, expected, atol=1e-5)
    assert used == {0, 1, 2}
    assert (found[-1] == 0).all()  # without area, without samples


def test_boxes_move_by_shares_of_their_size_and_are_cut_off():
    given = torch.tensor([[10.0, 20.0, 30.0, 60.0]])
    by = torch.tensor([[0.5, -0.25, math.log(2), math.log(0.5)]])
    assert torch.allclose(boxes.moved(given, by), torch.tensor([[10.0, 20.0, 50.0, 40.0]]))
    wide = boxes.moved(given, torch.tensor([[0.0, 0.0, 99.0, 0.0]]))
    assert float(wide[0, 2] - wide[0, 0]) == pytest.approx(62.5 * 20, rel=1e-5)
    assert boxes.clipped(wide, (50, 40)).tolist() == [[0.0, 20.0, 40.0, 50.0]]


def test_the_transformer_is_transformers_vitdet():
    from transformers import VitDetConfig, VitDetModel

    drawn = tiny.Drawn()
    tiny.vitdet(drawn)
    config = VitDetConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=1, image_size=1024, window_size=14,
                          pretrain_image_size=64, window_block_indices=[0, 1],
                          use_relative_position_embeddings=True)  # fmt: skip
    other = VitDetModel(config).eval()
    held = {}
    for name in other.state_dict():
        mine = name.replace("encoder.layer", "blocks").replace("attention", "attn")
        mine = mine.replace("embeddings.position_embeddings", "pos_embed")
        mine = mine.replace("embeddings.projection", "patch_embed.proj")
        held[name] = drawn.tensors[f"backbone.bottom_up.{mine}"]
    other.load_state_dict(held)
    picture = 5 * tiny.random(1, 3, 256, 320)  # 16 x 20 patches: windows of 14 are filled up
    with torch.inference_mode():
        expected = other(picture).last_hidden_state
        assert torch.allclose(ported.vitdet(drawn.tensors, 64)(picture).last_hidden_state, expected, atol=1e-4)


def test_things_and_their_texts_are_those_of_the_official_code():
    told = json.loads((Path(__file__).parent / "vbench_grit.json").read_text(encoding="utf-8"))
    weights = tiny.grit()
    picture = sampling.for_grit(noise(1, 250, 300, 3))[0]
    with torch.inference_mode():
        found = grit.things(picture, weights, ported.vitdet(weights, 64))
        names, sentences = (grit.texts(found.features, begin, weights) for begin in (grit.NAME, grit.SENTENCE))
    assert torch.allclose(found.boxes, torch.tensor(told["boxes"]), atol=2e-3)
    assert [bert.text(one, WORDS) for one in names.tolist()] == told["names"]
    assert [bert.text(one, WORDS) for one in sentences.tolist()] == told["sentences"]


def test_texts_end_by_themselves_or_at_forty_tokens_and_never_say_a_word_twice():
    weights = tiny.grit()
    features = 2 * tiny.random(3, 196, tiny.CHANNELS)
    endless = weights | {f"{grit.TEXT}.output.bias": weights[f"{grit.TEXT}.output.bias"].clone()}
    endless[f"{grit.TEXT}.output.bias"][bert.END] = -99
    with torch.inference_mode():
        found = grit.texts(features, grit.NAME, endless)
        assert found.shape == (3, 39)
        assert (found[:, 1:] != found[:, :-1]).all()
        endless[f"{grit.TEXT}.output.bias"][bert.END] = 99
        assert grit.texts(features, grit.NAME, endless).tolist() == [[bert.END]] * 3
        assert grit.texts(features[:0], grit.NAME, weights).shape == (0, 0)
        held = grit._remembered(features, weights)
        tokens = torch.tensor([[grit.NAME, 7, 8]] * 3)
        late = grit._following(tokens, held, weights)
        alone = grit._following(tokens[:1], grit._remembered(features[:1], weights), weights)
    assert torch.allclose(late[:1], alone, atol=1e-4)


def test_large_frames_are_sized_for_grit():
    small = noise(1, 768, 800, 3)
    assert torch.equal(sampling.for_grit(small), sampling.scaled(sampling.tensor(small), sampling.IMAGENET))
    large = noise(1, 800, 1001, 3)
    plain, rounded = sampling.for_grit(large), sampling.for_grit(large, rounded=True)
    assert plain.shape == rounded.shape == (1, 3, 720, 900)
    if find_spec("cv2") is not None:
        import cv2

        sized = cv2.resize(large[0], (900, 720), interpolation=cv2.INTER_LINEAR)
        apart = (rounded - sampling.scaled(sampling.tensor(sized[None]), sampling.IMAGENET)).abs()
        assert apart.max() < 1.5 / 255 / 0.224  # a level: OpenCV's shares are whole 2048ths
    flat = sampling.for_grit(np.full((1, 800, 800, 3), 9, np.uint8))
    assert torch.allclose(flat, sampling.scaled(torch.full((1, 3, 720, 720), 9.0), sampling.IMAGENET), atol=1e-5)


@pytest.fixture
def networks(tmp_path, monkeypatch) -> Networks:
    return tiny.networks_of("grit", {"model": tiny.grit(), "iteration": 3}, tmp_path, monkeypatch)


def test_networks_name_things_and_tell_of_them(networks):
    frames = noise(2, 100, 140, 3)
    weights = weight_files.read("grit", networks.folder)
    pictures = sampling.for_grit(frames)
    with torch.inference_mode():
        things = [grit.things(picture, weights, ported.vitdet(weights, 64)) for picture in pictures]
    assert len(things[0].boxes) > 3
    found, told = networks.detections(pictures), networks.sentences(pictures)
    for one, seen, said in zip(things, found, told, strict=True):
        assert [box for _, box in seen] == [[int(edge) for edge in box] for box in one.boxes.tolist()]
        assert len(said) == len(seen)
        assert {name for _, name in said} == {name for name, _ in seen[:1]}
    assert len({name for name, _ in found[0]}) > 2
    assert [sentence for sentence, _ in told[0]] != [name for name, _ in found[0]]


def test_nothing_is_found_where_no_place_is_likely_and_other_weights_are_refused(networks):
    path = networks.folder / weight_files.WEIGHT_FILES["grit"].path
    pictures, held = sampling.for_grit(noise(1, 100, 140, 3)), tiny.grit()
    held["proposal_generator.centernet_head.agn_hm.bias"] -= 99
    torch.save({"model": held}, path)
    assert Networks(networks.folder).detections(pictures) == Networks(networks.folder).sentences(pictures) == [[]]
    torch.save({"model": {"other": torch.zeros(1)}}, path)
    with pytest.raises(ConfigError, match=r"lacks 'backbone\..*'"):
        Networks(networks.folder).detections(pictures)


def test_four_dimensions_follow_from_what_grit_finds(networks, monkeypatch):
    means, frames = Means(networks=networks), noise(20, 40, 60, 3)
    chosen = sampling.for_grit(frames[sampling.middle(20, 16)])
    cat, dog = ("cat", [0, 0, 10, 10]), ("dog", [20, 0, 30, 10])
    seen = [[cat, dog]] * 4 + [[cat]] * 8 + [[]] * 4
    said = [[("a red cat", "cat"), ("a blue dog", "cat")]] * 4 + [[("a green cat", "cat")]] * 4 + [[]] * 8
    monkeypatch.setattr(networks, "detections", lambda given: seen if torch.equal(given, chosen) else [])
    monkeypatch.setattr(networks, "sentences", lambda given: said if torch.equal(given, chosen) else [])
    relation = {"object_a": "cat", "object_b": "dog", "relationship": "on the left of"}
    asked = {"object_class": "cat", "multiple_objects": "cat and dog", "color": "red", "spatial_relationship": relation}
    prompt = Prompt(text="a red cat", dimensions=(), targets=asked)
    video = Video(name="a-0.mp4", frames=frames, fps=8)
    expected = {"object_class": 12 / 16, "multiple_objects": 4 / 16, "color": 4 / 8, "spatial_relationship": 4 / 16}
    for name, value in expected.items():
        assert missing_reason(name, means) is None
        score = WAYS[name].measure(video, prompt, means)
        assert isinstance(score, rules.VideoScore)
        assert score.value == pytest.approx(value)


def test_what_grits_dimensions_lack_is_told_with_what_else_could_be_brought(tmp_path):
    reason = str(missing_reason("color", Means(networks=Networks(tmp_path))))
    assert "grit is missing: put https://datarelease.blob.core.windows.net/grit/models/" in reason
    assert f"at {tmp_path / 'grit_model' / 'grit_b_densecap_objectdet.pth'}; bert-words is missing" in reason
    assert reason.endswith("; or bring the captions by GRiT with --observations")
