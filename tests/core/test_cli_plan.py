"""`dit-accel plan`: published figures, what each method saves, models read off their configs, and its words."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dit_accel import recommend
from dit_accel.adapters.installed import families
from dit_accel.adapters.model_files import read_model_files
from dit_accel.cli.app import app
from dit_accel.errors import UnsupportedModel
from dit_accel.estimate.recommendation import WIDTH
from dit_accel.methods.presets import LEVELS, MEASURED_ON

WAN_69 = "wan2.1-14b --height 768 --width 1280 --num-frames 69"
PUBLISHED = "--radial --set radial.boundary=published"


def run(*words: str):
    """Run the command on a family and what else some words say."""
    family, *rest = " ".join(words).split()
    return CliRunner().invoke(app, ["plan", "--family", family, *rest])


def planned(*words: str) -> dict:
    result = run(*words, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def shown(*words: str) -> str:
    return " ".join(run(*words).stdout.split())


def notes(*words: str) -> str:
    return " ".join(run(*words).stderr.split())


def test_the_published_counts():
    plan = planned(WAN_69, PUBLISHED, "--set radial.decay_factor=0.2 --set radial.near=half")
    assert (plan["frames"], plan["tokens_per_frame"], plan["tokens"]) == (18, 3840, 69120)
    assert (plan["tiles_total"], plan["tiles_kept"], plan["methods"]["radial"]["near"]) == (291600, 76798, "half")
    assert 1 - plan["density"] == pytest.approx(0.7366324, abs=1e-7)
    assert plan["planned_total_flops"] < plan["total_flops"] == pytest.approx(560e15, rel=0.01)
    assert planned(WAN_69, PUBLISHED, "--set radial.near=full")["tiles_kept"] == 83728
    hunyuan = "hunyuan-video --height 768 --width 1280 --num-frames 117"
    assert 1 - planned(hunyuan, PUBLISHED)["density"] == pytest.approx(0.7254, abs=5e-5)
    assert 1 - planned(hunyuan, PUBLISHED, "--set radial.sink=true")["density"] == pytest.approx(0.6992, abs=5e-5)
    dense = planned("wan2.1-1.3b")
    assert dense["tiles_kept"] == dense["tiles_total"] == 256**2
    assert (dense["density"], dense["predicted_speedup"], dense["state_bytes"]) == (1.0, 1.0, 0)


@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 6))])
def test_plan_and_recommend_say_the_same_of_every_family_in_the_width_of_a_terminal(monkeypatch, tmp_path, first):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in [*families()][first::6]:
        recommended = recommend(name, hardware="h100")
        rows, text = {row.name: row for row in recommended.settings}, str(recommended)
        assert max(map(len, text.splitlines())) <= WIDTH, name
        unmeasured = f"no preset was measured on {name}: this is the general rule" in " ".join(text.split())
        assert unmeasured == (name not in MEASURED_ON), name
        for level in LEVELS:
            speedup = planned(name, "--preset", level)["predicted_speedup"]
            assert speedup == pytest.approx(rows[level].speedup, 1e-9), name
            assert (speedup > 1) == ("easycache" in rows[level].methods), name


def test_a_third_forward_is_counted_less_what_its_prefix_saves():
    softpag = "wan2.1-1.3b --set softpag.heads=L15H1 --set softpag."
    for words, share in (
        (f"{softpag}share_prefix=false", 3 / 2),
        (f"{softpag}stop=0.5", 1 + 0.5 * 0.5 / 2),  # half of the steps, half of the blocks
        (f"{softpag}mode=free", 1),
        ("wan2.1-1.3b --slg", 1 + (1 - 8 / 30) / 2),
    ):
        assert planned(words)["forward_share"] == pytest.approx(share)
    text = notes(f"{softpag}stop=0.1 --num-inference-steps 4")
    assert "begins at block 15 of 30, saving 50% of it" in text
    assert "is shorter than one of 4 steps; it acts in step 0 alone" in text
    assert "guidance is distilled into flux.1-dev" in notes("flux.1-dev --set pag.layers=L9")


def test_rows_that_only_the_foreground_computes():
    wan = "wan2.1-14b --set dfa.warmup_steps=10 --set dfa.last_steps=0"
    radial = "--radial --set radial.dense_steps=0 --set radial.dense_layers=0"
    plan, a = planned(wan, "--set dfa.share=0.25"), planned("wan2.1-14b")["attention_share"]
    attention = 0.6 + 0.4 * 0.25  # dense are 10 of 50, and every second of 40
    assert plan["dense_share"] == pytest.approx(30 / 50)
    assert plan["planned_attention_flops"] == pytest.approx(attention * plan["attention_flops"], rel=1e-3)
    assert plan["predicted_speedup"] == pytest.approx(1 / (1 - a + a * attention), rel=1e-3)  # the dense kernel's cost
    for options, density in (
        ("--set dfa.share=0.25", 0.25),
        ("--set dfa.share=0.5 --set dfa.strict=true", 0.25),
        (f"--set dfa.share=0.5 {radial}", planned("wan2.1-14b", radial)["density"] * (0.6 + 0.4 * 0.5)),
    ):
        assert planned(wan, options)["density"] == pytest.approx(density, abs=1e-3)
    assert "counted with 0.25 of the visual rows in 20 of 50 steps" in notes(wan, "--set dfa.share=0.25")
    unset = planned(wan)
    assert (unset["uncounted_methods"], unset["predicted_speedup"]) == (["dfa"], 1.0)
    assert "without dfa.share no row that it leaves out is counted" in notes(wan)


def write(folder: Path, index: dict, transformer: dict, vae: dict | None = None) -> str:
    """Write the configs of a model folder."""
    parts = {"model_index.json": index, "transformer/config.json": transformer, "vae/config.json": vae or {}}
    for file, data in parts.items():
        (folder / file).parent.mkdir(exist_ok=True, parents=True)
        (folder / file).write_text(json.dumps(data))
    return str(folder)


def plan_of(folder: str, *words: str):
    return CliRunner().invoke(app, ["plan", "--model", folder, *words])


def test_a_model_of_unknown_sizes_is_read_off_its_configs_and_so_is_how_long_its_tables_are(tmp_path):
    index = {"transformer": ["diffusers", "WanVACETransformer3DModel"], "vae": ["diffusers", "AutoencoderKLWan"]}
    sizes = {
        "_class_name": "WanVACETransformer3DModel", "num_layers": 4, "num_attention_heads": 3, "attention_head_dim": 64,
        "ffn_dim": 512, "patch_size": [1, 2, 2], "vace_layers": [0, 2],
    }  # fmt: skip
    family = read_model_files(write(tmp_path / "a", index, sizes)).identify()[1]
    assert (family.name, family.layers, family.heads, family.vae) == ("wan", 6, 3, (4, 8))
    assert family.recipes["radial"]["sink"] is True
    for options, most in (({"rope_max_seq_len": 64}, 64), ({}, 1024)):
        folder = write(tmp_path / str(most), index, {**sizes, **options})
        assert plan_of(folder, "--num-frames", str(4 * most - 3)).exit_code == 0
        longer = plan_of(folder, "--num-frames", str(4 * most + 1))
        assert longer.exit_code == 2
        assert f"wan has rotary positions for {most} tokens along frames, got {most + 1}; make" in longer.stderr
    del sizes["ffn_dim"]
    with pytest.raises(UnsupportedModel, match=r"'ffn_dim'.*--family"):
        read_model_files(write(tmp_path / "a", index, sizes)).identify()


def test_models_that_are_not_there(tmp_path, monkeypatch):
    def unreachable(url: str) -> None:
        raise ConnectionError("no route to host\nsecond line")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    for model, index, message in (
        ("nope", None, r"'nope'.*\(owner/name\)"),
        ("owner/no-such-model", None, r"'owner/no-such-model'.*model_index\.json \(ConnectionError"),
        (str(tmp_path), None, r"has no model_index\.json"),
        (str(tmp_path), "{", r"model_index.json.*Expecting"),
        (str(tmp_path), '{"unet": ["diffusers", "UNet2DConditionModel"]}', r"unet.*no transformer"),
    ):
        if index:
            (tmp_path / "model_index.json").write_text(index)
        with pytest.raises(UnsupportedModel, match=message):
            read_model_files(model)


def test_words_go_to_stderr_and_data_to_stdout_of_80_columns(monkeypatch):
    result = run("wan-plain --num-frames 16 --radial --json")
    assert "note: 16 frames are rounded to 17, as the pipeline does" in result.stderr
    assert "warning: radial seldom pays below 20000 visual tokens" in result.stderr
    assert json.loads(result.stdout)["num_frames"] == 17
    for part in ("69,120 (18 frames of 48 x 80)", "kappa = 1.15", "a = 0.699", "dense steps would save as much"):
        assert part in shown(WAN_69, "--radial")
    assert "no gain at this size" in shown(WAN_69, "--radial --kernel-cost 9")
    monkeypatch.setenv("COLUMNS", "80")
    for command in (f"plan --family {WAN_69} --radial", f"recommend --family {WAN_69} --hardware h100", "methods",
                    "methods --options", "generate --help"):  # fmt: skip
        assert max(map(len, CliRunner().invoke(app, command.split()).stdout.splitlines())) <= 80, command


def test_bad_input_is_one_line_and_exit_code_2():
    for words, message in (
        ("", "plan needs a model, got none; give --family"),
        ("--family wan-plain --model x", "plan takes --family or --model, got both (wan-plain and x)"),
        ("--model nope", "'nope' is no embedded model; known: flux-sizes, flux-tiny, "),
        ("--family wan2.1-15b", "no model family is called 'wan2.1-15b'; did you mean 'wan2.1-1"),
        ("--family wan2.1-14b --height 725", "height must be a multiple of 16"),
        ("--family cogvideox-2b --rope", "cogvideox has no rotary positions that could be changed"),
        ("--family cogview4-6b --rope", "cogview scales its positions along height, width to the trained size"),
        ("--family wan2.1-14b --heigth 720", "--height"),
        ("--family wan2.1-14b --set profilingcache.blocks=38-44", "names 7 blocks, of which wan2.1-14b lacks"),
        ("--family wan2.1-14b --preset balancd", "did you mean 'balanced'? known: balanced, careful, fast, f"),
    ):
        result = CliRunner().invoke(app, ["plan", *words.split()])
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert result.stderr.startswith("error: ")
        assert message in result.stderr


def test_a_longer_clip_is_held_against_the_trained_length_and_warned_of_where_no_method_is_for_it():
    for words, advice in (
        ("wan2.1-1.3b --num-frames 321 --radial", "attach --ultravico or --lvsa"),
        ("wan2.1-1.3b --num-frames 321 --lvsa", ""),
        ("hunyuan-video --num-frames 257", "attach --ultravico or --lvsa or --rope"),
        ("flux.1-dev --height 4096 --width 4096", "256 rows of tokens are 2.00 times the 128 that flux.1-dev was"),
        ("flux.1-dev --width 4096", "256 columns of tokens are 2.00 times the 128"),
        ("flux.1-dev --height 4096 --width 4096 --ultraimage", ""),
    ):
        text = notes(words)
        assert advice in text
        assert text.count("beyond which") == bool(advice)
    plan = planned("wan2.1-1.3b --num-frames 321 --lvsa")
    times, speedup = plan["times_trained"], plan["predicted_speedup"]
    assert times > speedup > 1
    assert 0 < plan["density"] < 0.3
    assert planned("wan2.1-1.3b --num-frames 81")["times_trained"] == 1.0
    text = shown("wan2.1-1.3b --num-frames 321 --lvsa")
    assert "3.86 times the trained 21" in text
    assert f"{times:.2f} times that of the trained size, dense, {times / speedup:.2f} with the methods" in text


def test_a_preset_is_planned_and_named_methods_win():
    fast = planned("wan2.1-14b --height 720 --width 1280 --preset fast")
    assert ([*fast["methods"]], fast["uncounted_methods"]) == (["ultravico", "sol", "easycache"], [])
    named = planned("wan2.1-14b --preset fast --set easycache.threshold=0.03 --radial")
    assert (named["methods"]["easycache"]["threshold"], "radial" in named["methods"]) == (0.03, True)
    assert named["uncounted_methods"] == ["easycache"]
    assert planned("wan2.1-14b --preset none")["methods"] == {}
    text = notes("flux.1-dev --preset careful")
    assert "preset careful: easycache skips every second step" in text
    assert "easycache is counted with 22% of the forwards skipped, as measured on tiny models" in text
    assert "forwards computed 7" in shown("flux.1-dev --preset careful")
    text = notes("wan2.1-14b --preset fast --staticcache")
    assert "easycache is left out: EasyCache and StaticCache both cache" in text
