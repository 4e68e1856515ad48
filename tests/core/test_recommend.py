"""Presets and what they rest on; what to attach: rows, predictions, losses, hardware, tuned files, and how it reads."""

import json
import sys
import warnings
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import diffusers
import pytest
import torch
from model_folders import model_folder
from typer.testing import CliRunner
from wan_tiny import denoise, tiny_transformer

import dit_accel
from dit_accel import ConfigError, EasyCache, LiteAttention, SolAttention, StaticCache, UltraViCo, recommend
from dit_accel.adapters.installed import adapters, described
from dit_accel.attachment.backends import UnplannedRun
from dit_accel.cli.app import app
from dit_accel.estimate import tuned
from dit_accel.estimate.hardware import HARDWARE, find_hardware
from dit_accel.estimate.prediction import estimate
from dit_accel.estimate.recommendation import WIDTH
from dit_accel.methods.base import Model
from dit_accel.methods.caches.easy import EasyHandler
from dit_accel.methods.few_steps import adds_noise, check_preset, few_steps_sign
from dit_accel.methods.preset_figures import figures, promise
from dit_accel.methods.presets import LEAST_STEPS, LEVELS, PRESETS, preset_methods

CACHE = StaticCache(every=2)


def named(level, adapter, family):
    model = Model(adapter=adapter, family=family, heads=family.heads, layers=family.layers)
    return [choice.config.name for choice in preset_methods(level, model).chosen]


@pytest.mark.parametrize(
    ("methods", "options", "names", "said"),
    [
        ((), {}, ["sol", "easycache"], "preset balanced: easycache skips every second step"),
        ((), dict(preset="none"), [], ""),
        ((CACHE,), {}, ["staticcache"], ""),
        ((CACHE,), dict(preset="fast"), ["sol", "staticcache"], "; easycache is left out: EasyCache and StaticCache"),
    ],
)
def test_without_a_method_a_preset_is_attached_named_methods_win_and_nothing_is_printed(
    capfd, methods, options, names, said
):
    with dit_accel.attach(tiny_transformer(), *methods, **options) as attachment:
        assert [handler.name for handler in attachment.engine.handlers] == names
        assert said in attachment.preset if said else attachment.preset == ""
        assert not said or attachment.preset in attachment.report().notes
    assert capfd.readouterr() == ("", "")


def test_the_method_that_a_transformer_refuses_is_left_out_and_the_reason_said(monkeypatch):
    def refuse(self, site):
        raise ConfigError("no cache on a Tuesday")

    monkeypatch.setattr(EasyHandler, "install", refuse)
    with dit_accel.attach(tiny_transformer(), preset="balanced") as attachment:
        assert [handler.name for handler in attachment.engine.handlers] == ["sol"]
        assert "; easycache is left out: no cache on a Tuesday" in attachment.preset
    with pytest.raises(ConfigError, match="Tuesday"):
        dit_accel.attach(tiny_transformer(), EasyCache(), preset="fast")


@pytest.mark.parametrize("steps", [12, 13, 20, 28, 50])
def test_levels_are_a_ladder_of_steps_that_may_be_skipped(steps: int):
    caches = [PRESETS[level][0].config for level in LEVELS]
    assert [cache.threshold for cache in caches] == sorted(cache.threshold for cache in caches)
    bound = [len(cache.skipped_steps(steps)) for cache in caches]
    assert bound == sorted(bound), "each level may skip as much as the one before, or more"
    assert bound[0] < bound[-1]
    for choice in (choice for level in LEVELS for choice in PRESETS[level]):
        assert choice.source.startswith(("measured: ", "published (arXiv "))


def test_every_preset_can_be_attached_to_every_released_model():
    """At most one method extends an axis; Wan, on which RIFLEx is not advised, gets UltraViCo."""
    for adapter in adapters().values():
        for family in adapter.families:
            for level in LEVELS:
                names = named(level, adapter, family)
                assert ("easycache" in names) == ("easycache" not in adapter.refused), family.name
                assert not {"rope", "ultravico"} <= {*names}, family.name
    assert "ultravico" in named("careful", *described("wan2.1-14b"))
    wan, family = described("wan2.1-1.3b")
    refusing = replace(wan, refused={"ultravico": "its clips have no end"})
    assert named("balanced", refusing, family) == ["easycache", "sol"]


class Distilled:
    """A pipeline of few steps, by its scheduler or its LoRA."""

    def __init__(self, scheduler: str = "EulerDiscreteScheduler", *loras: str) -> None:
        self.transformer = tiny_transformer()
        self.transformer.peft_config = dict.fromkeys(loras)
        self.components = {"transformer": self.transformer}
        self.scheduler = getattr(diffusers, scheduler)()


def test_a_model_of_few_steps_is_told_by_scheduler_or_lora_and_takes_its_own_preset():
    noisy, even = Distilled("FlowMatchLCMScheduler"), Distilled("FlowMatchEulerDiscreteScheduler", "Wan-4steps")
    for pipe in (noisy, even):
        with dit_accel.attach(pipe) as attachment:
            assert [one.name for one in attachment.engine.handlers] == ["sol", "staticcache"][: 1 + (pipe is even)]
            assert "preset few-steps" in attachment.preset
            assert ("staticcache is left out: the scheduler adds noise" in attachment.preset) == (pipe is noisy)
        for level in LEVELS:
            with pytest.raises(ConfigError, match=rf"{level} .*{LEAST_STEPS} .*(LCM|4steps).*few-steps"):
                dit_accel.attach(pipe, preset=level)
    for pipe in (Distilled("FlowMatchEulerDiscreteScheduler"), Distilled("FlowMatchEulerDiscreteScheduler", "a-style")):
        with dit_accel.attach(pipe) as attachment:
            assert "preset balanced" in attachment.preset
    loras = ("hyperrealism", "admdraw", "14steps", "Hyper-SDXL", "self-forcing", "lcm")
    known = [bool(few_steps_sign([Distilled("LCMScheduler", name).transformer], None)) for name in loras]
    assert known == [False] * 3 + [True] * 3
    check_preset("few-steps", "", 8, LEAST_STEPS)
    with pytest.raises(ConfigError, match=r"few-steps .* 9;"):
        check_preset("few-steps", "", 9, LEAST_STEPS)


def test_a_scheduler_that_adds_noise_anew_is_told():
    stochastic = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    by_option = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    adding = [stochastic, by_option, diffusers.EulerAncestralDiscreteScheduler(), "CogVideoXDPMScheduler"]
    steady = [None, object(), diffusers.DPMSolverMultistepScheduler(), diffusers.UniPCMultistepScheduler()]
    assert [*map(adds_noise, adding + steady)] == [True] * 4 + [False] * 4


def test_an_unknown_preset_and_a_named_method_that_does_not_fit_are_refused():
    fits = ((), "balance", "'balance'.*'balanced'"), ((UltraViCo(),), "careful", "ultravico.*trained_frames")
    for methods, preset, match in fits:
        with pytest.raises(ConfigError, match=match):
            dit_accel.attach(tiny_transformer(), *methods, preset=preset)


@pytest.mark.parametrize("steps", [4, 8, 9])
def test_runs_of_few_steps_are_computed_whole(steps):
    transformer = tiny_transformer(num_layers=1)
    config = EasyCache(threshold=1e9, warmup_steps=0, last_steps=0, min_steps=9)
    with dit_accel.attach(transformer, config) as attachment:
        denoise(transformer, steps, branches=("cond",))
        data = attachment.report().section("easycache").data
    assert (data["reused"] > 0) == (steps == 9)
    assert ({entry["reason"] for entry in data["forwards"]} == {"few steps"}) == (steps < 9)
    assert len(config.skipped_steps(steps)) == (0 if steps < 9 else 8)


@pytest.mark.parametrize("method", [SolAttention, LiteAttention], ids=lambda one: one.name)
@pytest.mark.parametrize("least", [80, 81])
def test_short_sequences_stay_dense_where_that_is_the_users_choice(method, least):
    transformer = tiny_transformer()
    config = method(block_size=16, dense_steps=0, dense_layers=0, min_tokens=least)
    with dit_accel.attach(transformer, config, backend="torch") as attachment, warnings.catch_warnings():
        warnings.simplefilter("error", UnplannedRun)
        out = denoise(transformer, 2)
        report = attachment.report()
    assert (sum(step.sparse_layers for step in report.steps) > 0) == (least == 80)
    assert any("80 visual tokens, min_tokens = 81" in note for note in report.notes) == (least == 81)
    assert least == 80 or torch.equal(out, denoise(transformer, 2))


ROOT = Path(__file__).parents[2]
KITE = dict(height=720, width=1280, num_frames=81, num_inference_steps=50)
SMALL = dict(height=480, width=832)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Find nothing that was tuned on this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(*words: str):
    return CliRunner().invoke(app, list(words))


def on_one_line(text: object) -> str:
    return " ".join(str(text).split())


def row(recommended, name):
    return next(setting for setting in recommended.settings if setting.name == name)


def test_rows_are_the_presets_and_dense_the_fastest_first():
    found = recommend("wan2.1-14b", **KITE)
    assert [one.name for one in found.settings] == ["fast", "balanced", "careful", "dense"]
    assert [one.speedup for one in found.settings] == sorted((one.speedup for one in found.settings), reverse=True)
    assert (found.tokens, found.family, found.num_frames) == (75_600, "wan2.1-14b", 81)
    fast, dense = row(found, "fast"), row(found, "dense")
    assert [*fast.methods] == ["easycache", "sol"]  # what is for more frames does nothing here
    assert fast.losses == {"easycache": promise("fast", 50).tenth, "sol": None}
    assert fast.medians == {"easycache": promise("fast", 50).median}
    assert fast.psnr is None
    assert fast.sources["sol"].startswith("published (arXiv ")
    assert fast.state_bytes == estimate(*described("wan2.1-14b"), methods=[PRESETS["fast"][1].config]).state_bytes > 0
    assert fast.needs == ("sol: a GPU with Triton",)
    assert (dense.speedup, dense.losses, dense.needs, dense.state_bytes) == (1.0, {}, (), 0)
    assert row(found, "careful").psnr == promise("careful", 50).tenth


def test_what_waits_for_a_larger_run_is_said_and_nothing_is_promised_of_it():
    fast = row(recommend("wan2.1-14b", **SMALL), "fast")
    assert (fast.needs, fast.state_bytes) == (("sol waits for 40,000 tokens, here 32,760",), 0)
    few = recommend("flux.1-dev", num_inference_steps=4)
    assert [*map(attrgetter("name"), few.settings)] == ["few-steps", "dense", *LEVELS]
    assert [*map(attrgetter("speedup"), few.settings)] == [pytest.approx(4 / 3), *[1.0] * 4]
    assert row(few, "fast").needs == (f"easycache waits for {LEAST_STEPS} steps, here 4",)
    assert all(text in on_one_line(few) for text in ("fast nothing acts in this run", "--preset few-steps."))


@pytest.mark.parametrize("steps", [LEAST_STEPS, 20, 30, 40, 50, 80])
def test_what_is_promised_is_what_was_measured_at_the_nearest_numbers_of_steps(steps):
    """The issue of every preset table before: 41 dB of 30 steps were printed for runs of 10."""
    recommended = recommend("flux.1-dev", num_inference_steps=steps)
    for level in LEVELS:
        away = min(abs(figure.steps - steps) for figure in figures(level))
        near = [figure for figure in figures(level) if abs(figure.steps - steps) <= away]
        found, setting = promise(level, steps), row(recommended, level)
        assert setting.losses["easycache"] == found.tenth <= min(figure.tenth for figure in near)
        assert found.tenth <= found.median <= max(figure.median for figure in near)
        assert f"{found.median:.0f} dB, of 9 in 10 {found.tenth:.0f} or more" in on_one_line(recommended)
        assert setting.speedup == pytest.approx(1 / (1 - found.skipped))
        assert promise(level, LEAST_STEPS - 1) is None


@pytest.mark.parametrize("steps", sorted({one.steps for level in LEVELS for one in figures(level)}))
def test_levels_are_ordered_at_every_number_of_steps(steps):
    careful, balanced, fast = (promise(level, steps) for level in LEVELS)
    assert careful.median >= balanced.median >= fast.median
    assert careful.tenth >= balanced.tenth >= fast.tenth
    assert careful.skipped < balanced.skipped < fast.skipped


def test_beyond_the_trained_size_what_extends_it_is_listed_without_a_loss():
    found = recommend("hunyuan-video", **SMALL, num_frames=257)
    careful = row(found, "careful")
    assert "rope" in careful.methods.keys() - careful.losses
    assert careful.sources["rope"].startswith("measured: docs/longer.md")
    assert "RIFLEx positions for more frames than trained [" in on_one_line(found)
    careful = row(recommend("wan2.1-14b", **SMALL, num_frames=121), "careful")
    assert ("ultravico" in careful.methods, careful.needs) == (True, ("ultravico: a GPU with Triton",))
    assert "ultravico" not in row(recommend("wan2.1-14b"), "careful").methods
    assert "78 frames are rounded to 77" in on_one_line(recommend("wan2.1-1.3b", num_frames=78))


def test_seconds_and_what_a_card_can_hold_are_said_of_known_hardware():
    dense = estimate(*described("wan2.1-14b"), **KITE)
    found = recommend("wan2.1-14b", **KITE, hardware="H100")
    least = (dense.total_flops - dense.attention_flops + dense.attention_flops / 0.75) / 989.4e12
    assert row(found, "dense").seconds == pytest.approx(least)
    assert row(found, "fast").seconds == pytest.approx(least / row(found, "fast").speedup)
    assert all(text in on_one_line(found) for text in (f"> {least:,.0f}", "by its data sheet"))
    unknown = recommend("wan2.1-14b", **KITE, hardware="24 GB")
    assert {one.seconds for one in unknown.settings} == {None}
    assert "seconds" not in str(unknown)
    assert unknown.weight_bytes == 2 * 40 * (8 * 5120**2 + 2 * 5120 * 13824)
    assert "26.2 GiB or more, beyond the 24 GiB there are" in on_one_line(unknown)
    assert "26.2 GiB or more of the 40 GiB" in on_one_line(recommend("wan2.1-14b", hardware="a100-40gb"))
    assert "GiB" not in on_one_line(recommend("wan2.1-14b", hardware="h200"))


def test_hardware_is_known_by_its_usual_names_and_others_are_refused():
    for name in ("RTX 4090", "rtx_4090", "rtx-4090", " RTX-4090 "):
        assert find_hardware(name) is HARDWARE["rtx-4090"]
    assert find_hardware("23.5 GiB").gib == 23.5
    for name in ("rtx4090", "0GB", "GB", "-3GB"):
        with pytest.raises(ConfigError, match=rf"'{name}'.*a100-40gb, .*rtx-4090.*24GB"):
            recommend("wan2.1-14b", hardware=name)


def test_cards_agree_with_the_kernels_predictions(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "kernels/bench"))
    from predictions import CARDS

    for name, card in CARDS.items():
        same = [one for one in HARDWARE.values() if one.name.startswith(name.lower().replace(" ", "-"))]
        assert {(one.tflops, one.attention) for one in same} == {(card.tflops, card.dense or 1.0)}, name
    sys.modules.pop("predictions")


def test_a_model_is_recommended_as_its_family_is(tmp_path):
    folder = model_folder(tmp_path / "mine")
    assert recommend(str(folder)).to_dict() == recommend(folder).to_dict()
    assert [*recommend(folder).settings] == [*recommend("wan-plain").settings]
    transformer = tiny_transformer()
    found = recommend(transformer)
    assert (found.family, found.num_inference_steps) == ("wan", 50)
    assert found.weight_bytes == sum(weight.numel() * 4 for weight in transformer.parameters())
    assert "no preset was measured on wan:" in on_one_line(found)


def keep(file: str, methods: list, steps: int = 20, speedup: float = 2.5, frames: int = 17) -> Path:
    """Keep what a tuner found for the embedded model."""
    record = tuned.TunedResult(
        model="wan-tiny", height=64, width=64, num_frames=frames, num_inference_steps=20, metric="psnr", quality=31.25,
        speedup=speedup, prompts=6,
    )  # fmt: skip
    return tuned.keep_tuned(file, tuned.tuned_text(methods, {"num_inference_steps": steps}, record, "why"), "wan-tiny")


def test_tuned_files_come_first_and_those_of_other_sizes_are_named():
    path = keep("quick.toml", [EasyCache(threshold=0.2)], 14)
    keep("slow.toml", [], 16, speedup=1.25)
    elsewhere = keep("long.toml", [EasyCache()], frames=33)
    found = recommend("wan-tiny")
    quick, slow, *_ = found.settings
    assert (quick.name, slow.name, quick.losses) == ("quick", "slow", {"psnr": 31.25})
    text = f"tuned on this model by dit-accel tune pipeline, 6 held-out prompts, psnr to the converged run: {path}"
    assert text in quick.sources["quick"]
    assert "quick 2.50x psnr 31.25 [1]" in on_one_line(found)
    assert any(note.endswith(str(elsewhere)) for note in found.notes)
    assert recommend("wan-tiny", num_frames=33).settings[0].name == "long"


def test_one_model_has_one_folder_of_tuned_files(tmp_path):
    import dit_accel_assets

    path = dit_accel_assets.model_path("wan-tiny")
    assert {tuned.model_key(name) for name in ("wan-tiny", "embedded/wan-tiny", str(path))} == {"wan-tiny"}
    assert tuned.tuned_folder("owner/name") != tuned.tuned_folder("owner-name")
    (tmp_path / "here").mkdir()
    assert tuned.model_key(str(tmp_path / "here" / ".." / "here")) == str(tmp_path / "here")


def test_a_tuned_file_that_is_none_is_refused_by_name():
    for text, named in (
        ("[easycache]\nthreshold = 0.1\n", "height"),
        ("[tuned]\nmodel = 3\n", "model, height"),
        ("tuned = 3\n", "tuned = 3"),
        ("not toml", "not valid TOML"),
    ):
        path = tuned.keep_tuned("broken.toml", text, "wan-tiny")
        with pytest.raises(ConfigError, match=rf"{path}.*{named}"):
            recommend("wan-tiny")


def test_the_commands_show_the_same_table_and_json(monkeypatch):
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    words = ["recommend", "--family", "wan2.1-14b", "--height", "720", "--width", "1280", "--hardware", "24GB"]
    found = recommend("wan2.1-14b", height=720, width=1280, hardware="24GB")
    assert on_one_line(run(*words).stdout) == on_one_line(found)
    assert json.loads(run(*words, "--json").stdout) == json.loads(json.dumps(found.to_dict()))
    assert run("recommend", "--model", "wan-tiny").exit_code == 0
    text = run("describe", "--model", "wan-tiny").stdout
    assert on_one_line(recommend("wan-tiny")).partition("note:")[0] in on_one_line(text)
    assert "transformer takes rope, lvsa, radial" in text
    options = run("describe", "--model", "wan-tiny", "--options").stdout
    assert "threshold=0.05" in options
    assert "predicted" not in options


def test_describe_leads_with_the_recommendation():
    transformer = tiny_transformer()
    description = dit_accel.describe(transformer)
    text, options = str(description), description.options()
    assert text.startswith("transformer: WanTransformer3DModel, adapter wan")
    assert str(recommend(transformer)) in text
    assert ("threshold=" in text, "threshold=0.05" in options, "pag: needs layers" in options) == (False, True, True)
    assert description.to_dict()["recommendation"]["settings"][0]["name"] == "fast"
    bare = str(replace(description, recommendation=None, not_recommended="no sizes"))
    assert "no recommendation: no sizes" in bare
    page = description._repr_html_()
    assert page.startswith("<div><b>transformer: WanTransformer3DModel, adapter wan")
    assert [text in page for text in ("<td", "easycache", "<script", "color:#")] == [True, True, False, False]


def test_the_page_of_presets_has_the_rule_s_numbers():
    page = (ROOT / "docs/presets.md").read_text(encoding="utf-8")
    for level in LEVELS:
        cache = PRESETS[level][0].config
        row = f"| `{level}` | {cache.warmup_steps:.0%} | {cache.last_steps} | {cache.max_consecutive:.0%} of the run |"
        assert (row in page, f"threshold {cache.threshold:g}," in page) == (True, True)
    betas = [str(PRESETS[level][1].config.beta) for level in LEVELS[1:]]
    for text in (f"beta {' or '.join(betas)}", f"from {SolAttention.worthwhile_tokens:,} visual tokens on",
                 f"from {PRESETS['fast'][0].config.min_steps} steps on"):  # fmt: skip
        assert text in page
