"""Many outputs of one `dit-accel generate`: lines of options, seeds, grids, tables and side-cars that repeat them."""

import json
from pathlib import Path
from typing import Any

import dit_accel_pipelines.generation.generate as generation
import numpy as np
import pytest
from dit_accel_pipelines.generation.batch import planned, read_seeds
from dit_accel_pipelines.generation.commands import GenerateOptions
from dit_accel_pipelines.generation.loading import load_pipeline
from dit_accel_pipelines.generation.request import Request
from PIL import Image
from typer.testing import CliRunner

from dit_accel import EasyCache, RadialAttention
from dit_accel.cli.app import app

PROMPT = "a red circle moving right"
QUICK = ["--num-inference-steps", "2", "--num-frames", "1", "--height", "32", "--width", "32", "-m", "wan-tiny"]


def cli(*arguments: Any):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load_pipeline(Request(prompt=PROMPT, output=Path("a.gif")))


@pytest.fixture
def loads(loaded, monkeypatch) -> list[Request]:
    """The requests for which a pipeline was loaded, which is always the same."""
    found: list[Request] = []
    monkeypatch.setattr(generation, "load_pipeline", lambda asked: found.append(asked) or loaded)
    return found


def lines(*rows: Any, name: str = "p.jsonl") -> None:
    Path(name).write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))


BAD: list[tuple[str, list[str], str]] = [
    ('{"prompt": "a circle"}\n\n{"prompt"', [], "p.jsonl, line 3 is no JSON (Expecting ':' delimiter"),
    ('["a circle"]', [], "p.jsonl, line 1 is '[\"a circle\"]', no object"),
    ('{"prompt": "a circle", "num-frame": 5}', [], "p.jsonl, line 1 has no option 'num-frame'; did you mean 'num-fr"),
    ('{"prompt": "a circle", "radail": true}', [], "line 1 has no option 'radail'; did you mean 'radial'?"),
    ('{"prompt": "a circle", "resume": true}', [], "line 1 has no option 'resume'"),
    ('{"prompt": "a circle", "seed": "x"}', [], "line 1: seed = 'x' is refused: Input should be a valid integer"),
    ('{"prompt": "a circle", "num-frames": 5.5}', [], "num-frames = 5.5 is refused"),
    ('{"prompt": "a circle", "check": 1}', [], "line 1: --check is true or false, got 1"),
    ('{"prompt": "a circle", "seed": {}}', [], "line 1: --seed is one value, got a table"),
    ('{"prompt": "a circle"}\n{"seed": 3}', [], "p.jsonl, line 2 has no prompt"),
    ('{"prompt": "a circle"}\n{"prompt": "a circle", "scale": 99}', [], "line 2: scale must be a whole number from 1"),
    ('{"prompt": "a circle"}\n{"prompt": "a kite"}', [], "error: out-02.mp4: no model was named"),
    ('{"prompt": "a circle", "output": "a.gif"}\n{"prompt": "a circle", "output": "a.gif"}', [], "two outputs are nam"),
    ("\n", [], "p.jsonl has no prompt in it"),
    ("prompt,seed\na circle,3,4\n", ["csv"], "p.csv, line 2 has not the 2 cells that the head names"),
    ("prompt,sed\na circle,3\n", ["csv"], "p.csv, line 2 has no option 'sed'; did you mean 'seed'?"),
    ('prompt\n"a circle', ["csv"], "p.csv, line 2 is no CSV (unexpected end of data)"),
]  # fmt: skip
ALONE: list[tuple[list[str], str]] = [
    (["--seeds", "3-1"], "--seeds takes whole numbers and ranges, such as 0-3 or 0,5,9, got '3-1'"),
    (["--seeds", "a"], "got 'a'"),
    (["--seeds", "0-99999999999"], "got '0-99999999999'"),
    (["--seeds", "0-1", "--seed", "4"], "generate takes --seed or --seeds, got 4 and '0-1'"),
    (["--seeds", "0-9999", "--grid", "seed=1,2"], "20,000 outputs were requested, and 10,000 is the most"),
    (["--grid", "num-frames"], "--grid 'num-frames' is not NAME=VALUE,VALUE"),
    (["--grid", "num-frames=5,,9"], "--grid 'num-frames=5,,9' is not NAME"),
    (["--grid", "num-frames=5", "--grid", "num-frames=9"], "two grids are of num-frames"),
    (["--grid", "frames=5"], "--grid has no option 'frames'; did you mean 'num-frames'?"),
    (["--grid", "radial.decay=1"], "radial has no option 'decay'"),
    (["--config", "bad.toml"], "[run] of --config has 'radial', a method; write a table of its own, [radial]"),
    (["--config", "none.json"], "--config none.json is no side-car that says how to repeat its output"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "suffix", "message"), BAD)
def test_a_bad_line_is_one_error_with_its_number_and_no_file(text, suffix, message):
    name = f"p.{(suffix or ['jsonl'])[0]}"
    Path(name).write_text(text)
    result = cli("--prompt-file", name)
    assert (result.exit_code, result.stdout, len(list(Path().iterdir()))) == (2, "", 1)
    assert message in result.stderr


@pytest.mark.parametrize(("arguments", "message"), ALONE)
def test_bad_seeds_grids_and_tables_are_refused_by_value(arguments, message):
    Path("bad.toml").write_text("[run]\nradial = true\n")
    Path("none.json").write_text('{"seed": 3}')
    result = cli("a circle", *arguments)
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_prompts_by_settings_by_seeds_and_what_of_them_wins():
    assert read_seeds("0-2, 9,1") == [0, 1, 2, 9]
    Path("p.csv").write_text(
        'prompt,num-frames,shift,radial,easycache.threshold\n"a circle, red",9,,,\na square,,3,false,.3\n'
    )
    options = GenerateOptions(
        prompt_file=Path("p.csv"), num_frames=17, seeds="4-5", grid=("num-inference-steps=2,3", "radial.rest=pooled")
    )
    made = planned(options, [RadialAttention(decay_factor=0.5)])
    requests = [one.request for one in made]
    assert [str(one.output) for one in requests] == [f"out-0{n}.mp4" for n in range(1, 9)]
    assert [one.prompt for one in requests] == ["a circle, red"] * 4 + ["a square"] * 4
    assert [one.num_frames for one in requests] == [9] * 4 + [17] * 4
    assert [one.num_inference_steps for one in requests] == [2, 2, 3, 3] * 2
    assert [one.seed for one in requests] == [4, 5] * 4
    assert {one.flow_shift for one in requests[4:]} == {3.0}
    assert requests[0].methods == (RadialAttention(decay_factor=0.5, rest="pooled"),)
    assert requests[7].methods == (EasyCache(threshold=0.3), RadialAttention(rest="pooled"))  # the grid attaches it
    assert (made[2].row, made[2].column) == ("a circle, red, num-inference-steps 3, radial.rest pooled", "seed 4")
    lines({"prompt": "a circle"}, {"prompt": "a square", "seed": 9, "output": "b.png"}, {"prompt": "a ring"})
    for same_seed, seeds in ((False, [7, 9, 9]), (True, [7, 9, 7])):
        options = GenerateOptions(prompt_file=Path("p.jsonl"), seed=7, same_seed=same_seed)
        requests = [one.request for one in planned(options, [])]
        assert [one.seed for one in requests] == seeds
        assert [str(one.output) for one in requests] == ["out-01.mp4", "b.png", "out-03.mp4"]


def test_a_batch_loads_once_and_makes_what_each_line_makes_alone(loads):
    """Whatever the line before attached, sampled with, or was of size."""
    own = (
        {"easycache.threshold": 0.5, "easycache.warmup_steps": 1, "easycache.last_steps": 0},
        {"solver": "euler", "shift": 7, "height": 48},
        {"height": 48},
        {"guidance-scale": 1.0, "num-inference-steps": 1, "scale": 2},
    )
    lines(*({"prompt": PROMPT, "seed": 5, **line} for line in own))
    result = cli("--prompt-file", "p.jsonl", *QUICK, "-o", "a.png")
    assert (result.exit_code, len(loads)) == (0, 1), result.stderr
    assert "a-02.png, 2 of 4, about 0:00:" in result.stderr
    assert "a-04.png, 4 of 4\n" in result.stderr
    for number, line in enumerate(own, 1):
        lines({"prompt": PROMPT, "seed": 5, **line})
        assert cli("--prompt-file", "p.jsonl", *QUICK, "-o", "alone.png").exit_code == 0
        assert Path("alone.png").read_bytes() == Path(f"a-0{number}.png").read_bytes(), line
    assert [Image.open(f"a-0{number}.png").size for number in (1, 4)] == [(32, 32), (64, 64)]
    whole = len(loads)
    lines({"prompt": PROMPT}, {"prompt": PROMPT, "compile": True}, {"prompt": PROMPT, "compile": True})
    plan = [one.request for one in planned(GenerateOptions(prompt_file=Path("p.jsonl")), [])]
    assert [generation._what_is_loaded(one) == generation._what_is_loaded(plan[2]) for one in plan] == [0, 1, 1]
    assert whole == 5


def test_a_side_car_repeats_its_output_and_the_command_line_wins(loads):
    Path("run.toml").write_text(
        f'[run]\nprompt = "{PROMPT}"\nnum-inference-steps = 3\nnum_frames = 1\nheight = 32\nwidth = 32\nseed = 3\n'
        'model = "wan-tiny"\nsolver = "euler"\nshift = 5.0\noutput = "t.gif"\nquiet = true\n'
        'arg = ["max_sequence_length=64"]\nattention-backend = "_native_math"\n'
        "[easycache]\nthreshold = 0.4\n"
    )
    result = cli("--config", "run.toml")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "t.gif\n", "")
    record = json.loads(Path("t.gif.json").read_text())
    assert {"seed": 3, "solver": "euler", "flow_shift": 5.0, "num_inference_steps": 3}.items() <= record.items()
    assert (record["arg"], record["attention_backend"]) == (["max_sequence_length=64"], "_native_math")
    assert cli("--config", "t.gif.json", "-o", "again.gif").exit_code == 0
    assert Path("again.gif").read_bytes() == Path("t.gif").read_bytes()
    over = ("--seed", 0, "--solver", "unipc", "--json", "-o", "b.gif")
    (other,) = json.loads(cli("--config", "t.gif.json", *over).stdout)
    assert (other["seed"], other["solver"], other["flow_shift"], other["num_frames"]) == (0, "unipc", None, 1)
    assert list(other["methods"]) == ["easycache"]
    assert "seed" in record["run"]
    assert "seed" not in other["run"]  # which is the default's


def test_a_grid_has_a_contact_sheet_and_is_resumed(loads):
    arguments = [PROMPT, *QUICK, "--seeds", "1,2", "--grid", "num-inference-steps=1,2", "-o", "g.gif"]
    result = cli(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "contact sheet: g.grid.png\n" in result.stderr
    with Image.open("g.grid.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"), float)
    height, width = pixels.shape[:2]
    assert (width > 2 * 256, 2 * 256 < height < 2 * 256 + 80) == (True, True)
    assert (pixels[-250:, -250:].std(), pixels[-250:, :150].std()) > (5, 0)  # frames on the right, words on the left
    assert np.abs(pixels[-250:, -250:] - pixels[-510:-260, -250:]).mean() > 1  # steps differ
    Path("g-03.gif").unlink()
    kept = cli(*arguments, "--resume")
    assert kept.stderr.count("kept: its side-car") == 3
    assert len(loads) == 2


def test_a_dry_run_says_what_would_run_and_loads_nothing(monkeypatch):
    monkeypatch.setattr(generation, "load_pipeline", lambda request: 1 / 0)
    arguments = ["a circle", "--seeds", "0-1", "--grid", "easycache.threshold=.1", "--num-frames", "10", "--dry-run"]
    result = cli(*arguments)
    assert (result.exit_code, list(Path().iterdir())) == (0, [])
    assert "10 frames are rounded to 11" in result.stderr
    for words in ("out-02.mp4", "64 x 64, 11 frames", "easycache", "GiB, by an estimate of", "time: not k"):
        assert words in " ".join(result.stdout.split()), words
    rows = json.loads(cli(*arguments, "--json").stdout)
    assert [(row["output"], row["seed"], row["methods"]) for row in rows] == [
        ("out-01.mp4", 0, ["easycache"]), ("out-02.mp4", 1, ["easycache"]),
    ]  # fmt: skip
    assert rows[0]["memory_bytes"] > 2**20
    assert [cli("a circle", *more, "--dry-run").exit_code for more in (("--height=33",), ("--model=flux-tiny-8",))] == [
        2,
        0,
    ]
