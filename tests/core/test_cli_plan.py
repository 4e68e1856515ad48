"""`dit-accel plan`: the note's figures, its JSON, its models and its words."""

import json
from pathlib import Path

import dit_accel_assets
import pytest
from typer.testing import CliRunner

from dit_accel.adapters.model_files import read_config, read_model_files
from dit_accel.cli.app import app
from dit_accel.errors import UnsupportedModel
from dit_accel.methods.registry import methods

KEYS = {
    "family", "repo", "height", "width", "num_frames", "num_inference_steps", "forwards", "frames", "tokens_per_frame",
    "tokens", "text_tokens", "tiles_total", "tiles_kept", "density", "dense_share", "forward_share", "attention_share",
    "attention_flops", "total_flops", "planned_attention_flops", "planned_total_flops", "tile_list_bytes",
    "pooled_bytes", "carried_bytes", "state_bytes", "kernel_cost", "predicted_speedup", "equal_steps", "methods",
    "uncounted_methods", "computed_blocks", "times_trained", "linears", "linear_share", "linear_time", "weight_bytes",
    "factors",
}  # fmt: skip
WAN_69 = ["--family", "wan2.1-14b", "--height", "768", "--width", "1280", "--num-frames", "69"]
NAMED = {"seg": "layers", "softpag": "heads", "pag": "layers"}
"""Methods for which nothing is published on Wan."""
PUBLISHED = ["--radial", "--set", "radial.boundary=published"]


def run(*arguments: str):
    return CliRunner().invoke(app, ["plan", *arguments])


def planned(*arguments: str) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_the_published_count():
    found = planned(*WAN_69, *PUBLISHED, "--set", "radial.decay_factor=0.2", "--set", "radial.near=half")
    assert set(found) == KEYS
    assert (found["frames"], found["tokens_per_frame"], found["tokens"]) == (18, 3840, 69120)
    assert (found["tiles_total"], found["tiles_kept"]) == (291600, 76798)
    assert 1 - found["density"] == pytest.approx(0.7366324, abs=1e-7)
    assert found["total_flops"] == pytest.approx(560e15, rel=0.01)
    assert found["planned_total_flops"] < found["total_flops"]
    assert found["methods"]["radial"]["near"] == "half"


def test_the_other_published_sparsities():
    full = planned(*WAN_69, *PUBLISHED, "--set", "radial.near=full")
    assert full["tiles_kept"] == 83728
    hunyuan = ["--family", "hunyuan-video", "--height", "768", "--width", "1280", "--num-frames", "117"]
    assert 1 - planned(*hunyuan, *PUBLISHED)["density"] == pytest.approx(0.7254, abs=5e-5)
    assert 1 - planned(*hunyuan, *PUBLISHED, "--set", "radial.sink=true")["density"] == pytest.approx(0.6992, abs=5e-5)


def test_a_dense_plan():
    found = planned("--family", "wan2.1-1.3b")
    assert found["tiles_kept"] == found["tiles_total"] == 256**2
    assert (found["density"], found["predicted_speedup"], found["state_bytes"]) == (1.0, 1.0, 0)


def test_every_method_can_be_planned_alone_and_beside_others():
    together = ["delta", "lite", "radial", "sol", "sparsed", "ultravico"]
    left = ("delta", "profilingcache", "ultraimage")  # it corrects another; has no list; is for images
    alone = [[name] for name in methods() if name not in left]
    for some in [*alone, ["radial", "delta"], ["sparsed", "sol"], together]:
        named = [f"--set={name}.{option}=L8" for name, option in NAMED.items() if name in some]
        found = planned("--family", "wan2.1-1.3b", "--num-frames", "161", *(f"--{name}" for name in some), *named)
        assert set(found["methods"]) == {*some}
        assert set(found["uncounted_methods"]) & {*together} == {*some} & {"lite"}


def test_a_third_forward_is_counted_less_what_its_prefix_saves():
    wan = ("--family", "wan2.1-1.3b")
    whole = planned(*wan, "--set", "softpag.heads=L15H1", "--set", "softpag.share_prefix=false")
    shared = planned(*wan, "--set", "softpag.heads=L15H1", "--set", "softpag.stop=0.5")
    free = planned(*wan, "--set", "softpag.heads=L15H1", "--set", "softpag.mode=free")
    assert whole["forward_share"] == pytest.approx(3 / 2)
    assert shared["forward_share"] == pytest.approx(1 + 0.5 * 0.5 / 2)  # half of the steps, half of the blocks
    assert free["forward_share"] == 1
    assert planned(*wan, "--slg")["forward_share"] == pytest.approx(1 + (1 - 8 / 30) / 2)
    said = run(*wan, "--set", "softpag.heads=L15", "--set", "softpag.stop=0.1", "--num-inference-steps", "4").stderr
    assert "begins at block 15 of 30, saving 50% of it" in said
    assert "is shorter than one of 4 steps; it acts in step 0 alone" in said
    assert "guidance is distilled into flux.1-dev" in run("--family", "flux.1-dev", "--set", "pag.layers=L9").stderr


def test_blocks_that_a_list_skips():
    found = planned("--family", "wan2.1-14b", "--profilingcache")
    assert found["computed_blocks"] == found["forward_share"] == pytest.approx(0.496, abs=1e-12)
    assert found["predicted_speedup"] == pytest.approx(1 / 0.496)
    table = " ".join(run("--family", "wan2.1-14b", "--profilingcache").stdout.split())
    assert "blocks computed 49.6% of the dense run's" in table
    skipped = planned("--family", "wan2.1-14b", "--staticcache", "--set", "staticcache.every=2")
    assert skipped["computed_blocks"] == skipped["forward_share"] < 1
    result = run("--family", "wan2.1-14b", "--set", "profilingcache.blocks=38-44")
    assert result.exit_code == 2
    assert "names 7 blocks, of which wan2.1-14b lacks 40-44: it has 40, numbered from 0 to 39" in result.stderr


def test_rows_that_only_the_foreground_computes():
    wan = ("--family", "wan2.1-14b", "--set", "dfa.warmup_steps=10", "--set", "dfa.last_steps=0")
    found = planned(*wan, "--set", "dfa.share=0.25")
    assert found["dense_share"] == pytest.approx(30 / 50)  # 10, and every second of 40
    assert found["density"] == pytest.approx(0.25, abs=1e-3)
    attention = 0.6 + 0.4 * 0.25
    assert found["planned_attention_flops"] == pytest.approx(attention * found["attention_flops"], rel=1e-3)
    a = found["attention_share"]
    assert found["predicted_speedup"] == pytest.approx(1 / (1 - a + a * attention), rel=1e-3)  # the dense kernel's cost
    assert found["uncounted_methods"] == []
    strict = planned(*wan, "--set", "dfa.share=0.5", "--set", "dfa.strict=true")
    assert strict["density"] == pytest.approx(0.25, abs=1e-3)
    beside = planned(
        *wan, "--set", "dfa.share=0.5", "--radial", "--set", "radial.dense_steps=0", "--set", "radial.dense_layers=0"
    )
    alone = planned(*wan[:2], "--radial", "--set", "radial.dense_steps=0", "--set", "radial.dense_layers=0")
    assert beside["density"] == pytest.approx(alone["density"] * (0.6 + 0.4 * 0.5), rel=1e-3)
    assert (
        "dfa is counted with 0.25 of the visual rows in 20 of 50 steps" in run(*wan, "--set", "dfa.share=0.25").stderr
    )
    unset = planned(*wan)
    assert (unset["uncounted_methods"], unset["predicted_speedup"]) == (["dfa"], 1.0)
    assert "without dfa.share no row that it leaves out is counted" in run(*wan).stderr


def test_a_method_that_corrects_others_is_not_planned_alone():
    result = run("--family", "wan2.1-1.3b", "--delta")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: delta corrects what a sparse method leaves out, but none is attached; add")


def test_a_folders_configs_are_enough(tmp_path: Path):
    source = dit_accel_assets.model_path("wan-plain")
    for file in ("model_index.json", "transformer/config.json", "vae/config.json"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text((source / file).read_text())
    found = planned("--model", str(tmp_path), "--num-frames", "33", "--radial")
    assert (found["family"], found["repo"]) == ("wan-plain", str(tmp_path))
    assert (found["frames"], found["tokens_per_frame"]) == (17, 64)


def test_a_model_of_unknown_sizes_is_read_off_its_configs(tmp_path: Path):
    index = {"transformer": ["diffusers", "WanVACETransformer3DModel"], "vae": ["diffusers", "AutoencoderKLWan"]}
    transformer = {
        "_class_name": "WanVACETransformer3DModel", "num_layers": 4, "num_attention_heads": 3, "attention_head_dim": 64,
        "ffn_dim": 512, "patch_size": [1, 2, 2], "vace_layers": [0, 2],
    }  # fmt: skip
    write(tmp_path, index, transformer)
    family = read_model_files(str(tmp_path)).identify()[1]
    assert (family.name, family.layers, family.heads, family.vae) == ("wan", 6, 3, (4, 8))
    assert family.recipes["radial"]["sink"] is True
    del transformer["ffn_dim"]
    write(tmp_path, index, transformer)
    with pytest.raises(UnsupportedModel, match=r"'ffn_dim'.*--family"):
        read_model_files(str(tmp_path)).identify()


def write(folder: Path, index: dict, transformer: dict) -> None:
    for file, data in (("model_index.json", index), ("transformer/config.json", transformer), ("vae/config.json", {})):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(json.dumps(data))


def test_models_that_are_not_there(tmp_path: Path, monkeypatch):
    with pytest.raises(UnsupportedModel, match=r"'nope'.*\(owner/name\)"):
        read_model_files("nope")
    with pytest.raises(UnsupportedModel, match=r"has no model_index\.json"):
        read_model_files(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(UnsupportedModel, match=r"model_index.json.*Expecting"):
        read_config(str(tmp_path), "model_index.json")
    (tmp_path / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    with pytest.raises(UnsupportedModel, match=r"unet.*no transformer"):
        read_model_files(str(tmp_path))

    def unreachable(url: str) -> None:
        raise ConnectionError("no route to host\nsecond line")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    with pytest.raises(UnsupportedModel, match=r"'owner/no-such-model'.*model_index\.json \(ConnectionError"):
        read_model_files("owner/no-such-model")


def test_words_go_to_stderr_and_data_to_stdout():
    result = run("--family", "wan-plain", "--num-frames", "16", "--radial", "--json")
    assert "note: 16 frames are rounded to 17, as the pipeline does" in result.stderr
    assert "warning: radial seldom pays below 20000 visual tokens" in result.stderr
    assert json.loads(result.stdout)["num_frames"] == 17


def test_the_table_names_its_assumptions():
    result = run(*WAN_69, "--radial")
    text = " ".join(result.stdout.split())
    for part in ("69,120 (18 frames of 48 x 80)", "kappa = 1.15", "a = 0.699", "dense steps would save as much"):
        assert part in text
    assert "no gain at this size" in run(*WAN_69, "--radial", "--kernel-cost", "9").stdout


@pytest.mark.parametrize("width", ["80", "120"])
def test_nothing_is_wider_than_the_terminal(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", width)
    recommended = ["recommend", *WAN_69, "--hardware", "h100"]
    listed = (["models"], ["methods"], ["methods", "--options"])
    for command in (["plan", *WAN_69, "--radial"], recommended, *listed, ["generate", "--help"]):
        result = CliRunner().invoke(app, command)
        assert max(map(len, result.stdout.splitlines())) <= int(width)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "plan needs a model, got none; give --family"),
        (["--family", "wan-plain", "--model", "x"], "plan takes --family or --model, got both (wan-plain and x)"),
        (["--family", "wan2.1-15b"], "no model family is called 'wan2.1-15b'; did you mean 'wan2.1-1"),
        (["--family", "wan2.1-14b", "--height", "725"], "height must be a multiple of 16"),
        (["--family", "flux.1-dev", "--radial"], "radial makes no sense on flux: an image is one frame"),
        (["--family", "cogvideox-2b", "--rope"], "cogvideox has no rotary positions that could be changed"),
        (["--family", "cogview4-6b", "--rope"], "cogview scales its positions along height, width to the trained size"),
        (["--family", "wan2.1-14b", "--heigth", "720"], "--height"),
        (["--family", "wan-plain", "--kernel-cost", "inf"], "kernel_cost must be above 0 and below 1000, got inf"),
        (["--family", "wan-plain", "--kernel-cost", "1e308"], "kernel_cost must be above 0 and below 1000, got 1e+308"),
        (["--model", "nope"], "'nope' is no embedded model; known: flux-tiny, wan-plain, wan-tiny; or name a folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_longer_clip_is_held_against_the_trained_length():
    found = planned("--family", "wan2.1-1.3b", "--num-frames", "321", "--lvsa")
    assert found["times_trained"] > found["predicted_speedup"] > 1
    assert 0 < found["density"] < 0.3
    assert planned("--family", "wan2.1-1.3b", "--num-frames", "81")["times_trained"] == 1.0
    shown = run("--family", "wan2.1-1.3b", "--num-frames", "321", "--lvsa")
    text = " ".join(shown.stdout.split())
    assert "3.86 times the trained 21" in text
    times, speedup = found["times_trained"], found["predicted_speedup"]
    assert f"{times:.2f} times that of the trained size, dense, {times / speedup:.2f} with the methods" in text
    assert "beyond which" not in shown.stderr
    alone = " ".join(run("--family", "wan2.1-1.3b", "--num-frames", "321").stderr.split())
    assert "81 latent frames are 3.86 times the 21 that wan2.1-1.3b was trained on, beyond which clips repeat" in alone
    assert alone.endswith("or fall apart; attach --ultravico or --lvsa")
    hunyuan = " ".join(run("--family", "hunyuan-video", "--num-frames", "257").stderr.split())
    assert hunyuan.endswith("attach --ultravico or --lvsa or --rope")
    radial = run("--family", "wan2.1-1.3b", "--num-frames", "321", "--radial")
    assert "beyond which" in " ".join(radial.stderr.split())


def wan_folder(folder: Path, **transformer) -> Path:
    parts = {"model_index.json": {"transformer": ["diffusers", "WanTransformer3DModel"]}}
    sizes = {"num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128, "patch_size": [1, 2, 2]}
    parts["transformer/config.json"] = {"_class_name": "WanTransformer3DModel", "ffn_dim": 8960, **sizes, **transformer}
    for name, content in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("wan2.1-14b", "--num-frames", "4097"), "wan has rotary positions for 1024 tokens along frames, got 1025; m"),
        (("wan2.1-14b", "--num-frames", "4097", "--lvsa"), "rotary positions for 1024 tokens along frames, got 1025"),
        (("anyflow-14b", "--num-frames", "4097"), "anyflow has rotary positions for 1024 tokens along frames, got 10"),
        (("wan-plain", "--num-frames", "513"), "wan has rotary positions for 256 tokens along frames, got 257"),
        (("cosmos-1-7b", "--width", "1936"), "cosmos has rotary positions for 120 tokens along width, got 121"),
        (("cosmos-predict2-2b", "--width", "2064"), "cosmos has rotary positions for 128 tokens along width, got 129"),
        (("z-image-turbo", "--height", "8208"), "z-image has rotary positions for 512 tokens along height, got 513"),
        (("lumina-image-2.0", "--height", "8208"), "lumina2 has rotary positions for 512 tokens along height, got 513"),
        (("cogvideox1.5-5b", "--height", "2416"), "cogvideox has rotary positions for 150 tokens along height, got 1"),
    ],
)
def test_lengths_beyond_the_tables_are_refused(arguments, message):
    result = run("--family", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    shorter = [str(int(word) - 16) if word.isdigit() else word for word in arguments]
    assert run("--family", *(word for word in shorter if word != "--lvsa")).exit_code == 0


def test_a_folders_config_tells_how_long_its_tables_are(tmp_path: Path):
    for name, told, most in (("short", {"rope_max_seq_len": 64}, 64), ("untold", {}, 1024)):
        folder = str(wan_folder(tmp_path / name, **told))
        assert run("--model", folder, "--num-frames", str(4 * most - 3)).exit_code == 0
        longer = run("--model", folder, "--num-frames", str(4 * most + 1))
        assert longer.exit_code == 2
        assert f"wan has rotary positions for {most} tokens along frames, got {most + 1}; make" in longer.stderr


def test_a_larger_picture_is_held_against_the_trained_size():
    flux = " ".join(run("--family", "flux.1-dev", "--height", "4096", "--width", "4096").stderr.split())
    assert "256 rows of tokens are 2.00 times the 128 that flux.1-dev was trained on, beyond which pictures" in flux
    assert "attach --ultraimage or --rope" in flux
    assert "columns" not in flux
    wide = " ".join(run("--family", "flux.1-dev", "--width", "4096").stderr.split())
    assert "256 columns of tokens" in wide
    served = run("--family", "flux.1-dev", "--height", "4096", "--width", "4096", "--ultraimage")
    assert "beyond which" not in served.stderr
    assert "256 x 256 tokens, trained on 128 x 128; positions corrected" in " ".join(served.stderr.split())


def test_a_preset_is_planned_and_named_methods_win():
    fast = planned("--family", "wan2.1-14b", "--height", "720", "--width", "1280", "--preset", "fast")
    assert [*fast["methods"]] == ["ultravico", "sol", "easycache"]
    assert fast["predicted_speedup"] > 1.5
    named = planned("--family", "wan2.1-14b", "--preset", "fast", "--set", "easycache.threshold=0.03", "--radial")
    assert named["methods"]["easycache"]["threshold"] == 0.03
    assert "radial" in named["methods"]
    assert planned("--family", "wan2.1-14b", "--preset", "none")["methods"] == {}
    said = run("--family", "flux.1-dev", "--preset", "careful").stderr
    assert "preset careful: easycache skips every second step" in said
    assert "not counted here, but in `dit-accel recommend`" in said
    refused = run("--family", "wan2.1-14b", "--preset", "balancd")
    assert refused.exit_code == 2
    assert "no preset is called 'balancd'; did you mean 'balanced'? known: balanced, careful, fast, none" in (
        refused.stderr
    )
