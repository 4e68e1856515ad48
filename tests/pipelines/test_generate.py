"""`dit-accel generate` and `describe` on the embedded model: files, side-cars, bad input, interruption."""

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dit_accel_pipelines.generation.generate as generation
import imageio_ffmpeg
import numpy as np
import pytest
from diffusers import WanPipeline
from dit_accel_assets import held_out_prompts, model_defaults, model_names, model_path
from dit_accel_pipelines.generation.generate import generate, run
from dit_accel_pipelines.generation.loading import compile_blocks, empty_transformers, load_pipeline
from dit_accel_pipelines.generation.pipeline_call import CallSignature, pipeline_class
from dit_accel_pipelines.generation.quiet import quiet_diffusers
from dit_accel_pipelines.generation.request import Request, read_prompts, resolve
from model_folders import model_folder
from PIL import Image
from typer.testing import CliRunner

from dit_accel import RadialAttention, StaticCache, attach
from dit_accel.adapters import installed
from dit_accel.adapters.model_files import read_model_files
from dit_accel.cli.app import app
from dit_accel.errors import ConfigError, UnsupportedModel

PROMPT = "a red circle moving right"
QUICK = ["--num-inference-steps", "2", "--num-frames", "9", "--height", "32", "--width", "48"]
RADIAL = ["--set", "radial.dense_steps=1", "--set", "radial.dense_layers=0"]


def cli(*arguments: str):
    return CliRunner().invoke(app, ["generate", *arguments])


def request(tmp_path: Path, **changes: Any) -> Request:
    values: dict[str, Any] = {
        "prompt": PROMPT, "output": tmp_path / "a.mp4", "num_inference_steps": 2, "num_frames": 9, "height": 32,
        "width": 48,
    }  # fmt: skip
    return Request(**{**values, **changes})


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> WanPipeline:
    return load_pipeline(request(tmp_path_factory.mktemp("pipe")))


@pytest.fixture
def pipe(loaded: WanPipeline, monkeypatch) -> WanPipeline:
    """The embedded pipeline, which `generate` finds loaded."""
    monkeypatch.setattr(generation, "load_pipeline", lambda request: loaded)
    return loaded


def test_a_video_and_all_that_is_needed_to_repeat_it(tmp_path: Path):
    result = cli(PROMPT, *QUICK, *RADIAL, "--seed", "3", "-o", str(tmp_path / "a.mp4"))
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'a.mp4'}\n"
    assert "attention calls: 24 dense, 24 sparse" in result.stderr
    assert names(tmp_path) == ["a.mp4", "a.mp4.json"]
    assert next(imageio_ffmpeg.read_frames(str(tmp_path / "a.mp4")))["size"] == (48, 32)
    record = json.loads((tmp_path / "a.mp4.json").read_text())
    known = {"prompt": PROMPT, "model": "wan-tiny", "height": 32, "width": 48, "num_frames": 9, "seed": 3, "fps": 8}
    assert known.items() <= record.items()
    assert (record["num_inference_steps"], record["dtype"], record["device"]) == (2, "float32", "cpu")
    assert record["guidance_scale"] == 4.0
    assert record["methods"]["radial"]["dense_steps"] == 1
    assert record["report"]["methods"]["radial"]["block_size"] == 16
    assert record["versions"]["torch"] == version("torch")
    assert len(record["seconds"]["steps"]) == 2
    assert record["peak_memory_bytes"]["host"] > 2**27


@pytest.mark.parametrize("name", model_names())
def test_embedded_models_run_by_name_with_their_own_defaults(tmp_path: Path, name: str):
    (prompt,) = held_out_prompts(name, 1)
    asked, *_ = resolve(Request(prompt=prompt, output=tmp_path / "a.png", model=name))
    own, call = model_defaults(name), CallSignature.of(pipeline_class(read_model_files(asked.source)))
    made_with = {**asked.beside(call), **asked.call_arguments()}
    assert {key: value for key, value in own.items() if call.takes(key)}.items() <= made_with.items()
    assert (asked.source, asked.dtype, asked.output_fps) == (str(model_path(name)), "float32", 8)
    with pytest.raises(ConfigError, match=r"word\(s\) xylophone"):
        resolve(Request(prompt="a xylophone", output=tmp_path / "a.mp4", model=name))
    assert name in installed.families()
    if name.startswith("flux"):  # whose guidance scale is that by a negative prompt, since it has no other
        assert dataclasses.replace(asked, guidance_scale=1.0).beside(call)["true_cfg_scale"] == 1.0
        assert cli(prompt, "--model", name, "--num-inference-steps=1", "-o", str(tmp_path / "a.png")).exit_code == 0
        assert json.loads((tmp_path / "a.png.json").read_text())["guidance_scale"] == own["true_cfg_scale"]


ONE = "generate takes a prompt in quotes or --prompt-file, got"
PURPLE = "unknown word(s) purple; the embedded model knows only: a, above, and"
BAD: list[tuple[list[str], str]] = [
    ([], f"{ONE} neither; give one of them"),
    (["a", "--prompt-file", "x"], f"{ONE} both"),
    ([" "], "generate needs a prompt, got none; write one in quotes, or give --prompt-file"),
    (["--prompt-file", "none.txt"], "--prompt-file none.txt can't be read (No such file or directory)"),
    (["a purple circle"], PURPLE),
    (["a kite"], "no model was named, so the tiny embedded wan-tiny was taken: prompt 'a kite': unknown word"),
    (["..."], "prompt '...' has no word in it; say what to show, such as \"a red circle\""),
    (["a circle", "--nag"], "nag leads away from a text, and none is set; give a negative prompt, such as"),
    (["a circle", "--negative-prompt", "ugly"], "unknown word(s) ugly"),
    (["a circle", "--negative-prompt", " ,"], "prompt ' ,' has no word in it"),
    (["a circle", "--num-frames", "0"], "num_frames must be >= 1, got 0"),
    (["a circle", "--num-frames", "4000000000001"], "wan has rotary positions for 256 tokens along frames"),
    (["a circle", "--num-inference-steps", "0"], "num_inference_steps must be >= 1, got 0"),
    (["a circle", "-m", "flux-tiny", "--height", "1600000", "--width", "1600000", "-o", "a.png"],
     "an output of 1 frames, 1,600,000 x 1,600,000, takes 28,610 GiB for its pixels alone, and this machine"),
    (["a circle", "-o", "a.avi"], "output a.avi ends in '.avi'; use one of .mp4, .webm, .gif, .png, or a"),
    (["a circle", "-o", "none/a.mp4"], "none is not a folder; create it first"),
    (["a circle", "-o", "a" * 250 + ".mp4"], "can't be written: File name too long; choose another folder or name"),
    (["a circle", "--guidance-scale", "nan"], "guidance_scale must be a finite number, got nan"),
    (["a circle", "--fps", "nan"], "fps must be from 0.01 to 240, got nan"),
    (["a circle", "--scale", "0"], "scale must be a whole number from 1 to 64, got 0"),
    (["a circle", "--seed", str(2**63)], "seed must be from 0 to 2**63 - 1, got 9223372036854775808"),
    (["a circle", "--seed", "-1"], "seed must be from 0 to 2**63 - 1, got -1"),
    (["a circle", "--image", "a.png"], "WanPipeline takes no image, got a.png; leave it out"),
    (["a circle", "--dtype", "float23"], "there is no dtype 'float23'; did you mean 'float32'"),
    (["a circle", "--solver", "ulber"], "there is no solver 'ulber'; did you mean 'euler'"),
    (["a circle", "--offload", "model", "--device", "cpu"], "offload 'model' needs an accelerator, got device cpu"),
    (["a circle", "--device", "gpu"], "device 'gpu' can't be used here; choose from cpu"),
    (["a circle", "--radail"], "--radial"),
    (["a circle", "--backend", "torch"], "backend 'torch' was requested, but no method is attached; switch one on"),
    (["a circle", "--check", "--preset", "none"], "was requested, but no method is attached; switch one on"),
    (["a circle", "--check", "--radial", "-o", "nowhere/a.mp4"], "nowhere is not a folder"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_line_exit_code_2_and_no_file(arguments, message, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = cli(*arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n"), names(tmp_path)) == (2, "", 1, [])
    assert message in result.stderr


GUIDED, UNGUIDED = ["--guidance-scale", "4"], ["--guidance-scale", "1"]
TOY, NOTHING = "no --model was given, so wan-tiny is taken", "no method is attached, so this is the model as it is"
IDLE = "the negative prompt does nothing at guidance_scale 1; raise --guidance-scale, or add --nag"
NOTES: list[tuple[list[str], set[str]]] = [
    ([], {TOY, NOTHING}),
    (["-m", "wan-tiny"], {NOTHING}),
    (["--preset", "none"], {TOY}),
    (["--radial"], {TOY}),
    (["--radial", "--negative-prompt", "blue", *GUIDED], {TOY}),
    (["--radial", "--negative-prompt", "blue", *UNGUIDED], {TOY, IDLE}),
    (["--nag", "--negative-prompt", "blue", *UNGUIDED], {TOY, "nag leads away from the negative prompt 'blue'"}),
    (["-m", "wan-tiny", "--radial", "-o", "there.gif"], {"there.gif is there; it is replaced when the new one is"}),
    (["-m", "flux-tiny", "--easycache", "--negative-prompt", "blue", *UNGUIDED, "-o", "a.png"],
     {"the negative prompt does nothing at true_cfg_scale 1; raise --guidance-scale, or add --nag"}),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "expected"), NOTES)
def test_what_was_taken_unnamed_does_nothing_or_is_replaced_is_noted(tmp_path, monkeypatch, arguments, expected):
    """Up to the loading of the model, with the prompt beside a comment in a file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("# shapes\na red circle\n  # more\n")
    (tmp_path / "there.gif").touch()
    seen: list[Any] = []
    monkeypatch.setattr(generation, "load_pipeline", lambda request: seen.append(request) or 1 / 0)
    told = cli("--prompt-file", "p.txt", "-o", "a.gif", *arguments).stderr
    notes = [line.removeprefix("note: ") for line in told.splitlines() if line.startswith("note: ")]
    assert len(notes) == len(expected)
    assert all(any(note.startswith(one) for note in notes) for one in expected)
    (asked,) = seen
    assert asked.prompt == "a red circle"
    assert [one.negative_prompt for one in asked.methods if one.name == "nag"] == (
        ["blue"] if "--nag" in arguments else []
    )


def test_prompt_files_are_read_and_every_output_must_be_writable_before_anything_runs(tmp_path: Path):
    for taken, output in (("a.mp4.json", "a.mp4"), ("b.gif", "b.gif")):
        (tmp_path / taken).mkdir()
        with pytest.raises(ConfigError, match=rf"{taken}.*a folder"):
            request(tmp_path, output=tmp_path / output)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ConfigError, match=r"--prompt-file .*empty.txt.*no prompt"):
        read_prompts(tmp_path / "empty.txt")
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfa red circle\r\na blue square\r\n")  # a byte-order mark
    assert read_prompts(tmp_path / "marked.txt") == ("a red circle", "a blue square")


def copy_model(folder: Path) -> Path:
    """Make a folder of the embedded model's configs, without its weights."""
    for source in model_folder(folder).rglob("*.safetensors"):
        source.unlink()
    return folder


def test_models_that_no_adapter_knows(tmp_path: Path):
    folder = copy_model(tmp_path / "model")
    with pytest.raises(UnsupportedModel, match=r"diffusers.*load '.*model': "):  # it has no weights
        load_pipeline(request(tmp_path, model=str(folder)))
    config = json.loads((folder / "transformer/config.json").read_text())
    (folder / "transformer/config.json").write_text(json.dumps({**config, "_class_name": "WanTransformer4D"}))
    asked = request(tmp_path, model=str(folder), height=34)
    assert resolve(asked) == (asked, None, [], [])
    with pytest.raises(ConfigError, match=r"H.264.*got 48 x 33"):
        resolve(dataclasses.replace(asked, height=33))
    with pytest.raises(UnsupportedModel, match=r"adapter.*class WanTransformer4D"):
        resolve(dataclasses.replace(asked, methods=(RadialAttention(),)))


def test_methods_need_no_sizes_that_generate_does_not_use(tmp_path: Path, pipe):
    """A transformer of the sizes of no released model, whose config also lacks one: the pipeline's defaults hold."""
    for lacking in ("num_layers", "ffn_dim"):
        folder = model_folder(tmp_path / lacking, transformer={"num_layers": 4, lacking: None})
        asked = request(tmp_path, model=str(folder), num_frames=5, methods=(RadialAttention(dense_steps=0),))
        assert resolve(asked) == (asked, None, [], [])
    (written,) = generate([dataclasses.replace(asked, output=tmp_path / "a.gif", num_inference_steps=1)])
    assert written.report is not None
    assert written.record["num_frames"] == 5


def test_an_error_leaves_no_file_and_nothing_attached(tmp_path: Path, pipe, monkeypatch):
    def processors() -> dict[str, Any]:
        return {name: part.processor for name, part in pipe.transformer.named_modules() if hasattr(part, "processor")}

    def interrupt(path: Path, frames: np.ndarray, **_: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    before = processors()
    monkeypatch.setattr(generation, "write_media", interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate([request(tmp_path, num_inference_steps=1, num_frames=5, methods=(RadialAttention(dense_steps=0),))])
    assert names(tmp_path) == []
    assert all(processors()[name] is processor for name, processor in before.items())
    assert "_dit_accel_attachment" not in vars(pipe.transformer)


def test_values_that_are_no_numbers_are_no_picture():
    frames = np.zeros((1, 2, 4, 4, 3), np.float32)
    frames[0, 1, 2, 2, 0] = np.nan
    with pytest.raises(ConfigError, match=r"no numbers \(nan"):
        generation.frames_of(SimpleNamespace(frames=frames))


def test_blocks_are_compiled_exactly_when_asked(tmp_path: Path, pipe, monkeypatch):
    compiled: list[Any] = []
    monkeypatch.setattr(generation, "compile_blocks", compiled.append)
    for compiling in (False, True):
        asked = request(tmp_path, output=tmp_path / "a.gif", num_inference_steps=1, num_frames=1, compile=compiling)
        (written,) = generate([asked])
        assert compiled == ([pipe] if compiling else [])
        assert written.record["compile"] is compiling
    parts = [SimpleNamespace(compile_repeated_blocks=lambda fullgraph: compiled.append(fullgraph)) for _ in "ab"]
    compile_blocks(SimpleNamespace(transformer=parts[0], transformer_2=parts[1]))
    assert compiled[-2:] == [True, True]


def test_quiet_prints_nothing_but_the_file_and_libraries_are_quiet_inside_alone(tmp_path: Path, pipe):
    arguments = [PROMPT, *QUICK, "--num-inference-steps", "1", "--num-frames", "4", "-o", str(tmp_path / "a.gif")]
    assert "note: 4 frames are rounded to 5, as the pipeline does\n" in cli(*arguments).stderr
    result = cli(*arguments, "--quiet")
    assert (result.stdout, result.stderr) == (f"{tmp_path / 'a.gif'}\n", "")
    from diffusers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet_diffusers():
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.ERROR, False)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_describe_needs_no_weights(tmp_path: Path):
    plain = ["--model", str(copy_model(tmp_path))]
    for arguments, own in (([], ("wan-tiny", 12)), (plain, ("wan-plain", 6))):
        result = CliRunner().invoke(app, ["describe", *arguments, "--json"])
        assert result.exit_code == 0, result.stderr
        (part,) = json.loads(result.stdout)["transformers"]
        assert (part["family"], part["layers"], part["methods"]["radial"]["sink"]) == (*own, True)
        assert json.loads(result.stdout)["files"] == []
    text = CliRunner().invoke(app, ["describe"]).stdout
    assert text.startswith("transformer: WanTransformer3DModel, adapter wan, wan-tiny")
    assert all(p.is_meta for p in empty_transformers(None).components["transformer"].parameters())
    missing = CliRunner().invoke(app, ["describe", "--model", "none"])
    assert (missing.exit_code, missing.stderr.count("\n")) == (2, 1)


CACHE = ["--set", "staticcache.every=2", "--set", "staticcache.warmup_steps=1", "--set", "staticcache.last_steps=0"]


def test_a_check_is_made_from_the_same_seed_and_written_beside(tmp_path: Path, pipe):
    longer = [*QUICK, "--num-inference-steps", "4", "--num-frames", "5"]
    result = cli(PROMPT, *longer, *CACHE, "--check", "--seed", "3", "-o", str(tmp_path / "a.mp4"))
    assert result.exit_code == 0, result.stderr
    assert names(tmp_path) == ["a.check.png", "a.mp4", "a.mp4.json"]
    assert f"both and their difference: {tmp_path / 'a.check.png'}" in result.stderr
    assert "measured speed-up: " in result.stderr
    assert Image.open(tmp_path / "a.check.png").width > 100
    record = json.loads((tmp_path / "a.mp4.json").read_text())
    changes = dict(num_inference_steps=4, num_frames=5, seed=3, check=True, methods=(StaticCache(every=2),))
    asked = resolve(request(tmp_path, **changes))[0]
    dense = run(pipe, asked).pictures
    assert not np.array_equal(run(pipe, dataclasses.replace(asked, seed=4)).pictures, dense)
    with attach(pipe, StaticCache(every=2, warmup_steps=1, last_steps=0)):
        cached = run(pipe, asked).pictures
    expected = -10 * np.log10(np.mean((dense - cached) ** 2))
    assert record["check"]["metrics"]["psnr"] == pytest.approx(expected, abs=1e-3)
    assert f"psnr {expected:.4g}" in result.stderr


def test_a_preset_attaches_what_it_says_and_named_methods_win(tmp_path: Path, pipe):
    result = cli(PROMPT, *QUICK, "--preset", "balanced", "-o", str(tmp_path / "a.mp4"))
    assert result.exit_code == 0, result.stderr
    assert "preset balanced: easycache skips" in result.stderr
    record = json.loads((tmp_path / "a.mp4.json").read_text())
    assert record["preset"] == "balanced"
    assert record["report"]["methods"]["easycache"]["max_consecutive"] == 0.03
    assert "measured speed-up: 1" in result.stderr or "measured speed-up: 0" in result.stderr
    assert "(predicted 1.00)" in result.stderr  # a run of two steps is computed whole
    named = cli(PROMPT, *QUICK, *CACHE, "--preset", "fast", "-q", "--json", "-o", str(tmp_path / "b.mp4"))
    assert "easycache" not in json.loads(named.stdout)[0]["report"]["methods"]
    assert "preset" not in named.stderr
    (tmp_path / "c").mkdir()
    none = cli(PROMPT, *QUICK, "--preset", "none", "--json", "-o", str(tmp_path / "c" / "a.mp4"))
    assert json.loads(none.stdout)[0]["report"] is None


def test_what_computes_dense_attention_reaches_attach_and_the_side_car(tmp_path: Path, pipe, monkeypatch):
    seen = []
    monkeypatch.setattr(generation.dit_accel, "attach", lambda *a, **k: seen.append(k["dense"]) or attach(*a, **k))
    for dense in ((), ("--dense", "user"), ("--dense", "auto")):
        result = cli("a circle", *QUICK, "--num-frames", "1", "--staticcache", *dense, "-o", str(tmp_path / "o.mp4"))
        assert result.exit_code == 0, result.stderr
        assert json.loads((tmp_path / "o.mp4.json").read_text())["dense"] == seen[-1]
    assert seen == [None, "user", "auto"]
