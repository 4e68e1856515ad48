"""The experiment of longer clips: trainings in turns, arms judged with their LoRA, a run that goes on, the tables."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import finetuned
import numpy as np
import pytest
from dit_accel_assets.clips import clip_of, draw
from dit_accel_eval.runs.counting import Counts
from dit_accel_eval.runs.model import Run
from finetuned import main, read_experiment, table

from dit_accel import ConfigError, RadialAttention

COMMITTED = Path(__file__).parents[2] / "eval" / "finetuning" / "finetuned-wan-plain.toml"
TEXT = """version = 1
name = "some"
model = "wan-plain"
clips = 2
num_inference_steps = 2
num_frames = 65

[training]
drawn = 2
steps = 50
rank = 2

[trainings.dense]

[trainings.radial]
radial = { block_size = 64 }

[[arm]]
name = "2x"

[[arm]]
name = "2x, learned"
lora = "radial"
radial = { block_size = 64 }
"""


@pytest.fixture
def calls(monkeypatch) -> list[Any]:
    """What was trained, loaded and generated, in order, with nothing computed."""
    noted: list[Any] = []

    def train(recipe):
        noted.append((recipe.output.name, recipe.steps, recipe.resume, len(recipe.methods)))
        folder = recipe.output / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"step-{recipe.steps:08d}.pt").touch()
        seconds = 1.0 if recipe.methods else 2.0
        with (recipe.output / "log.jsonl").open("a") as log:
            line = {"step": recipe.steps, "loss": 1 / recipe.steps, "seconds_a_step": seconds, "density": 0.5}
            log.write(json.dumps(line) + "\n")
        return SimpleNamespace(record={"rank": recipe.rank, "command": ["x"], "seconds_a_step": {}})

    class FakeModel:
        name, weights = "wan-plain", finetuned.weights_hash("wan-plain")

        def __init__(self, name, call):
            self.pipe = SimpleNamespace(unload_lora_weights=lambda: noted.append("unloaded"))

        def prompt(self, clip):
            return clip_of(clip, frames=1, held_out=True)[0]

        def run(self, clip, *, steps, solver, methods, call):
            noted.append((clip, steps, call["num_frames"], len(methods)))
            frames = draw(clip_of(clip, held_out=True)[1], call["num_frames"]).astype(np.float32) / 255
            return Run(frames=frames if methods else frames[::-1], counts=Counts(blocks=1, attention=1), attended=1.0,
                       seconds=1.0)  # fmt: skip

    monkeypatch.setattr(finetuned, "finetune", train)
    monkeypatch.setattr(finetuned, "EmbeddedModel", FakeModel)
    monkeypatch.setattr(finetuned, "load_lora", lambda pipe, name: noted.append(Path(name).name))
    return noted


def test_trainings_take_turns_and_arms_are_judged_once(tmp_path: Path, calls, capsys):
    path = tmp_path / "finetuning" / "some.toml"
    path.parent.mkdir()
    path.write_text(TEXT)
    asked = [str(path), "--work", str(tmp_path / "work")]
    assert main(asked) == 0
    turns = [(name, end, end > 20, many) for end in (20, 40, 50) for name, many in (("dense", 0), ("radial", 1))]
    judged = [(0, 2, 65, 0), (1, 2, 65, 0), "radial", (0, 2, 65, 1), (1, 2, 65, 1), "unloaded"]
    assert calls == turns + judged
    assert main(asked) == 0
    assert calls == turns + judged
    out = tmp_path / "results" / "some.jsonl"
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["arm"] for line in lines] == ["training dense", "training radial", *["2x"] * 2, *["2x, learned"] * 2]
    assert [line["score"] for line in lines[2:]] == [0.75, 0.75, 1.0, 1.0]  # backwards is another direction
    printed = capsys.readouterr().out
    assert table(read_experiment(path), lines) in printed
    assert "| dense | 50 | 0.50 | 0.050, 0.020 | 2.00 | 1.00 |" in printed
    assert "| radial | 50 | 0.50 | 0.050, 0.020 | 1.00 | 0.50 |" in printed
    assert "| 25.00 |" in printed
    path.write_text(TEXT.replace("rank = 2", "rank = 4"))
    assert main(asked) == 2
    assert "holds results of arm '2x, learned' with recipe {" in capsys.readouterr().err


def test_a_training_that_was_stopped_begins_with_the_one_that_is_behind(tmp_path: Path, calls):
    experiment_path = tmp_path / "some.toml"
    experiment_path.write_text(TEXT)
    for name, step in (("dense", 40), ("radial", 20)):
        folder = tmp_path / "work" / name / "checkpoints"
        folder.mkdir(parents=True)
        (folder / f"step-{step:08d}.pt").touch()
    list(finetuned.train(read_experiment(experiment_path), tmp_path / "work"))
    assert [call[:3] for call in calls] == [("radial", 40, True), ("dense", 50, True), ("radial", 50, True)]


def test_the_committed_experiment_reads_and_its_recipes_are_whole(tmp_path: Path):
    experiment = read_experiment(COMMITTED)
    assert experiment.name == COMMITTED.stem
    dense, radial = (experiment.recipe(name, tmp_path) for name in ("dense", "radial"))
    assert dense.methods == ()
    assert isinstance(radial.methods[0], RadialAttention)
    assert (dense.num_frames, dense.seed, dense.cache) == (radial.num_frames, radial.seed, radial.cache)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("version = 1", "version = 2", "of version 1,"),
        ('name = "some"', 'nane = "some"', r"key 'nane'.*'name'"),
        ("clips = 2\n", "", "lacks clips"),
        ('lora = "radial"', 'lora = "raidal"', r"training 'raidal'.*'radial'"),
        ('name = "2x"\n', "", r"arm.*name: \{\}"),
        ("block_size = 64", "block = 64", r"radial.*option 'block'"),
        ("[training]", "[training", r"some\.toml.*TOML"),
    ],
)
def test_bad_experiments_say_what_is_wrong(tmp_path: Path, old, new, message):
    path = tmp_path / "some.toml"
    path.write_text(TEXT.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message):
        read_experiment(path)
    with pytest.raises(ConfigError, match=r"experiment at .*none\.toml"):
        read_experiment(tmp_path / "none.toml")
