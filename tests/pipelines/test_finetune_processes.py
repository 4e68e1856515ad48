"""`dit-accel finetune` in several processes: they train what one does, tell alike what is wrong, lose no checkpoint."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from dit_accel_pipelines.generation.lora import FILE
from finetunes import base_folder, processes, trained, video_folder, weights
from PIL import Image
from trainable_folders import CASES, pipeline_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, videos, and what was encoded of them."""
    return base_folder(tmp_path_factory.mktemp("finetune"))


def gradients(folder: Path) -> torch.Tensor:
    """What AdamW has seen after its first step, from the checkpoint; its update alone would tell signs."""
    saved = torch.load(folder / "checkpoints" / "step-00000001.pt", weights_only=True)
    return torch.cat([state["exp_avg"].flatten() for state in saved["optimizer"]["state"].values()])


@pytest.mark.parametrize(
    ("many", "ulysses", "name"),
    [(2, 1, None), (2, 2, "hunyuan-video"), (4, 2, None)],
    ids=["clips", "ulysses", "groups"],
)
def test_processes_train_what_one_does(base: Path, tmp_path: Path, many: int, ulysses: int, name: str | None):
    """Each with clips of its own; all with the same; and two groups of two, each with its clips."""
    asked: dict[str, Any] = dict(steps=1, learning_rate=1e-3)
    if name is not None:
        case, base = CASES[name], tmp_path
        pipeline_folder(case, base / "model")
        video_folder(base / "videos", frames=case.frames, size=case.size)
        asked |= dict(num_frames=case.frames, height=case.size, width=case.size)
    sampled = dict(sample_every=1, sample_steps=1) if many == 4 else {}
    alone = trained(base, tmp_path / "alone", batch_size=2, **asked, **sampled)
    own = 2 * ulysses // many
    told = processes(
        many, base, output=tmp_path / "many", batch_size=own, ulysses=ulysses, gradient_checkpointing=ulysses > 1,
        **asked, **sampled,
    )  # fmt: skip
    assert told == [""] * many
    one, other = gradients(tmp_path / "alone"), gradients(tmp_path / "many")
    assert one.abs().max() > 0
    assert (one - other).abs().max() < 1e-4 * one.abs().max()
    loras = alone, weights(tmp_path / "many")
    assert loras[0].keys() == loras[1].keys()
    assert max(float((value - loras[1][key]).abs().max()) for key, value in loras[0].items()) < 1e-5
    records = [json.loads((tmp_path / name / "finetune.json").read_text()) for name in ("alone", "many")]
    assert [record["processes"] for record in records] == [1, many]
    assert records[0]["clips a step"] == records[1]["clips a step"] == 2
    assert records[0]["density"] == records[1]["density"] < 1
    losses = [json.loads((tmp_path / name / "log.jsonl").read_text())["loss"] for name in ("alone", "many")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    if sampled:  # by the first group, while the other waits
        sheets = [
            np.asarray(Image.open(tmp_path / name / "samples" / "step-00000001.png")) for name in ("alone", "many")
        ]
        assert np.abs(sheets[0].astype(int) - sheets[1]).max() <= 2
    if name is None:
        trained(base, tmp_path / "many", batch_size=2, **{**asked, "steps": 2}, resume=True)  # in one process


def test_what_is_wrong_is_told_by_every_process(base: Path, tmp_path: Path):
    told = processes(2, base, output=tmp_path / "out", num_frames=17)
    assert [error.startswith("refused: video") for error in told] == [True, True], told
    assert not (tmp_path / "out" / FILE).exists()
    trained(base, tmp_path / "lora", batch_size=2, steps=1)
    told = processes(2, base, output=tmp_path / "lora", rank=4, resume=True)
    assert [error.startswith("refused: the checkpoint") for error in told] == [True, True], told
    told = processes(3, base, output=tmp_path / "out", ulysses=2)
    assert ["ulysses = 2 processes are to share each clip, and 3 were started" in error for error in told] == [True] * 3


def test_a_lost_process_is_told_and_its_checkpoint_gone_on_from(base: Path, tmp_path: Path):
    told = processes(2, base, output=tmp_path / "out", steps=3, checkpoint_every=1, lose=1)
    assert told[1] == "killed"
    assert "refused: another of the 2 processes that train together ended or no longer answers" in told[0]
    assert "start all again with --resume" in told[0]
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000001.pt"]
    trained(base, tmp_path / "out", batch_size=2, steps=3, resume=True)
