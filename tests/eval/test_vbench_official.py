"""VBench's rules and sampling beside the official code's own functions, on random input.

The functions are taken out of the wheel that $DIT_ACCEL_VBENCH_WHEEL names (`pip download --no-deps vbench==0.1.5`);
without it there is nothing to compare with.
"""

import ast
import hashlib
import os
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dit_accel_eval.vbench import rules, sampling
from dit_accel_eval.vbench.official import PACKAGE

WHEEL = os.environ.get("DIT_ACCEL_VBENCH_WHEEL")

pytestmark = pytest.mark.skipif(WHEEL is None, reason="DIT_ACCEL_VBENCH_WHEEL names no wheel of vbench 0.1.5")

ROUNDS = 500


def official(file: str, *names: str) -> Any:
    """Return functions or classes of a module of the wheel, without importing it."""
    assert WHEEL is not None
    assert hashlib.sha256(Path(WHEEL).read_bytes()).hexdigest() == PACKAGE.sha256
    with zipfile.ZipFile(WHEEL) as wheel:
        tree = ast.parse(wheel.read(f"vbench/{file}"))
    found = {"np": np, "random": random, "torch": torch}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in names:
            exec(compile(ast.Module([node], []), file, "exec"), found)
    return found[names[0]]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_middle_frames():
    theirs = official("utils.py", "get_frame_indices")
    for count in (8, 16):
        for total in range(1, 400):
            assert sampling.middle(total, count) == list(theirs(count, total, sample="middle"))


def test_spatial_relationship(rng):
    theirs = official("spatial_relationship.py", "check_generate", "get_position_score")
    relations = ["on the left of", "on the right of", "on the top of", "on the bottom of"]
    for _ in range(ROUNDS):
        frames = []
        for _ in range(3):
            corners = [
                (*rng.integers(0, 40, 2).tolist(), *rng.integers(1, 30, 2).tolist()) for _ in range(rng.integers(5))
            ]
            frames.append([[str(rng.choice(["cat", "dog", "tree"])), [x, y, x + w, y + h]] for x, y, w, h in corners])
        relation = str(rng.choice(relations))
        expected = theirs({"object_a": "cat", "object_b": "dog", "relationship": relation}, frames)
        assert rules.stands(frames, "cat", "dog", relation).more["frame_results"] == pytest.approx(expected)


def test_color(rng):
    theirs = official("color.py", "check_generate")
    said = ["a red car", "a bored cat", "blue car", "car", "a grey cat", "yellow-red car", "pink", "a pinkish car"]
    for _ in range(ROUNDS):
        frames = [
            [(str(rng.choice(said)), str(rng.choice(["car", "cat"]))) for _ in range(rng.integers(4))]
            for _ in range(16)
        ]
        of_any, right = theirs("red", "car", frames)
        found = rules.is_colored(frames, "a red car", "red")
        assert (found is None) == (of_any == 0)
        assert found is None or found.value == pytest.approx(right / of_any)


def test_objects_and_scenes(rng):
    objects, scenes = official("multiple_objects.py", "check_generate"), official("scene.py", "check_generate")
    for _ in range(ROUNDS):
        seen = [rng.choice(["cat", "dog", "bird"], rng.integers(4)).tolist() for _ in range(16)]
        both = objects("cat and dog", [set(frame) for frame in seen])
        assert rules.shows(seen, "cat and dog").more["success_frame_count"] == both
        captions = rng.choice(["a train station", "train", "station of trains", "alley"], 16).tolist()
        found = rules.is_scene(captions, "train station").more["success_frame_count"]
        assert found == scenes({"scene": "train station"}, captions)


def flow_of(lengths: list[float]) -> Any:
    left = iter(lengths)
    return lambda one, two: np.stack([np.full((16, 20), next(left)), np.zeros((16, 20))])


def test_dynamic_degree_and_static_filter(rng):
    moving, still = (cls.__new__(cls) for cls in (official("dynamic_degree.py", "DynamicDegree"),
                                                  official("cli/static_filter.py", "StaticFilter")))  # fmt: skip
    for _ in range(ROUNDS):
        frames = np.zeros((int(rng.integers(5, 40)), 16, 20, 3), np.uint8)
        pairs, ends = len(frames) - 1, 2
        for one in (moving, still):
            one.set_params(torch.zeros(1, 3, 16, 20), len(frames))
        moved = (rng.choice([0, 0.9, 1.1, 2.0], pairs, p=[0.5, 0.2, 0.2, 0.1]) * 6 * 16 / 256).tolist()
        assert rules.is_dynamic(frames, flow_of(moved)).value == moving.check_move(moved)
        least = 3 * 16 / 256
        kept = (rng.choice([0, 0.9, 1.1], pairs, p=[0.7, 0.2, 0.1]) * least).tolist()
        kept += (rng.choice([0, 3.9, 4.1, 20], ends) * least).tolist()
        assert rules.is_static(frames, flow_of(kept)) == still.check_static(kept)
