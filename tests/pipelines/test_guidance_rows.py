"""Guidance in stock pipelines beside the matrix, and that every class of diffusers is covered and tells its prompts."""

import ast
import inspect
import re
from collections.abc import Iterable
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from dit_accel_pipelines import ADAPTERS
from dit_accel_pipelines.families.not_supported import NOT_SUPPORTED
from matrix_cases import plain_of
from matrix_runs import rows_call, run
from tiny_stock import PIPELINES, stock_pipeline
from torch import nn

import dit_accel
from dit_accel import NAG, PAG, SLG, ConfigError, UnsupportedModel
from dit_accel.adapters import installed
from dit_accel.adapters.adapter import Adapter
from dit_accel.methods.prompt_branches import NAMES

BRANCHES = {"pag": PAG(layers="L1", scale=2.0), "slg": SLG(layers="L1", scale=2.0, start=0.0, stop=1.0)}
FREE = PAG(layers="L1", mode="free")


def far(one, other):
    return float((one - other).abs().max())


def rows(name, pipe, call, *prompts):
    """The latents of some prompts, all from one seed."""
    return run(pipe, rows_call(PIPELINES[name], call, prompts), (0,) * len(prompts))


FREELY = ("FluxPipeline", "WanPipeline", "CogVideoXPipeline", "Lumina2Pipeline")
"""Pipelines guided in two calls and in one, by scales of other meanings, with a rescaled prediction."""


def require_rows_alone(name, pipe, call):
    """Require that two prompts are what they are alone, and return the latents of the first."""
    both = rows(name, pipe, call, 0, 1)
    alone = torch.cat([rows(name, pipe, call, prompt) for prompt in (0, 1)])
    assert far(both, alone) <= 2e-5 * float(alone.abs().max())
    return alone[:1]


@pytest.mark.parametrize("name", FREELY)
def test_two_prompts_are_guided_freely_as_alone(name):
    plain = plain_of(name)
    pipe, call = plain.pipe, plain.call
    if name == "FluxPipeline":
        negative = {f"negative_{key}": torch.ones_like(call[key]) for key in ("prompt_embeds", "pooled_prompt_embeds")}
        call = {**call, "true_cfg_scale": 2.0, **negative}
    before = rows(name, pipe, call, 0)
    with dit_accel.attach(pipe, FREE):
        alone = require_rows_alone(name, pipe, call)
    assert far(alone, before) > 1e-4 * float(alone.abs().max())


def ends_guidance(pipe, step, timestep, held):
    """diffusers' own way to guide the first steps alone."""
    if step == 1:
        half = len(held["prompt_embeds"]) // 2
        held.update({key: value[half:] for key, value in held.items() if key != "latents"})
        pipe._guidance_scale = 0.0
    return held


@pytest.mark.parametrize("method", [BRANCHES["pag"], BRANCHES["slg"], FREE], ids=lambda one: f"{one.name} {one.mode}")
def test_guidance_in_one_call_that_ends_midway_guides_the_right_rows(method):
    name = "StableDiffusion3Pipeline"
    pipe, call = stock_pipeline(name)
    held = ["latents", "prompt_embeds", "pooled_prompt_embeds"]
    call.update(num_inference_steps=4, callback_on_step_end=ends_guidance, callback_on_step_end_tensor_inputs=held)
    plain = rows(name, pipe, call, 0)
    with dit_accel.attach(pipe, method) as attachment:
        alone = require_rows_alone(name, pipe, call)
        steps = attachment.report().section(method.name).data["steps"]
    assert far(alone, plain) > 1e-2
    assert steps == ([0, 1] if method.mode == "free" else [0, 1, 2, 3])


@pytest.mark.parametrize(("method", "guided"), [(BRANCHES["pag"], 6), (FREE, 4)], ids=["branch", "free"])
def test_guidance_in_one_call_that_a_pipeline_truncates_guides_the_right_rows(method, guided):
    """Z-Image goes on saying that it guides while its forwards hold the conditional prompt alone."""
    pipe, call = stock_pipeline("ZImagePipeline")
    with dit_accel.attach(pipe, method) as attachment:
        require_rows_alone("ZImagePipeline", pipe, {**call, "num_inference_steps": 6, "cfg_truncation": 0.5})
        assert attachment.report().section("pag").data["steps"] == list(range(guided))


def test_a_pipeline_of_another_class_that_tells_nothing_is_refused_by_name():
    class Own(diffusers.FluxKontextPipeline):
        def __call__(self, prompt_embeds, pooled_prompt_embeds, **_):
            self.transformer(
                hidden_states=torch.randn(2, 80, 4), timestep=torch.ones(2), guidance=torch.ones(2),
                pooled_projections=pooled_prompt_embeds.expand(2, -1), txt_ids=torch.zeros(6, 3),
                encoder_hidden_states=prompt_embeds.expand(2, -1, -1), img_ids=torch.zeros(80, 3),
            )  # fmt: skip

    class Same(diffusers.FluxKontextPipeline):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    pipe, call = stock_pipeline("FluxKontextPipeline")
    other, same = Own(**pipe.components), Same(**pipe.components)
    same.set_progress_bar_config(disable=True)
    for method in (PAG(layers="L1"), NAG(negative_embeds=torch.ones(1, 6, 16))):
        message = rf"{method.name}.*which prompt.*Own.*transformer\.cache_context\(name\) .*adapter 'flux'"
        with dit_accel.attach(other, method), torch.no_grad(), pytest.raises(ConfigError, match=message):
            other(**call)
        with dit_accel.attach(same, method):
            assert rows("FluxKontextPipeline", same, call, 0).isfinite().all()


def test_pipelines_with_perturbed_attention_of_their_own_are_refused():
    pipe, call = stock_pipeline("StableDiffusion3Pipeline")
    parts = {name: part for name, part in pipe.components.items() if name not in ("image_encoder", "feature_extractor")}
    other = diffusers.StableDiffusion3PAGPipeline(**parts, pag_applied_layers="blocks.1$")
    other.set_progress_bar_config(disable=True)
    refused = pytest.raises(ConfigError, match=r"pag.*StableDiffusion3PAGPipeline.*perturbed attention")
    with dit_accel.attach(other.transformer, PAG(layers="L1")), refused:
        rows("StableDiffusion3Pipeline", other, {**call, "pag_scale": 0.0}, 0)


def test_beside_a_pipeline_s_own_skipped_layers_all_predictions_get_the_same():
    """SD3 runs the conditional prompt again without some layers: a third prediction, to which the same is added."""
    pipe, call = stock_pipeline("StableDiffusion3Pipeline")
    call = {**call, "num_inference_steps": 1, "skip_guidance_layers": [0], "skip_layer_guidance_stop": 1.0,
            "skip_layer_guidance_start": -1.0}  # fmt: skip

    def added(scale, method):
        changed = {**call, "guidance_scale": scale}
        plain = rows("StableDiffusion3Pipeline", pipe, changed, 0)
        with dit_accel.attach(pipe, method) as attachment:
            latents = rows("StableDiffusion3Pipeline", pipe, changed, 0)
            return latents - plain, attachment.report().section(method.name).data

    once, data = added(2.0, BRANCHES["pag"])
    assert data["forwards_added"] == 1
    assert float((once - added(4.0, BRANCHES["pag"])[0]).norm() / once.norm()) < 2e-3
    assert added(2.0, FREE)[1]["branches"] == ["call 0"]
    embeds = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(3))
    assert added(2.0, NAG(negative_embeds=embeds))[1]["branches"] == ["call 0", "call 1"]


def test_a_rescaling_that_only_an_argument_asks_for_is_seen():
    guidance = installed.adapters()["flux-kin"].guidance
    assert "normalize" in inspect.signature(diffusers.BriaPipeline.__call__).parameters
    for value, why in ((True, "normalize = True scales the guided prediction by the conditional one"), (False, None)):
        call = dit_accel.adapters.guidance.PipelineCall(None, ("BriaPipeline",), {"normalize": value})
        assert guidance.why_not_folded(call) == why


# Every transformer is covered or listed with a reason, and every pipeline class tells its prompts

ROOT = Path(diffusers.__file__).parent
TRANSFORMERS = ROOT / "models/transformers"
ADAPTER_OF = {name: adapter for adapter in ADAPTERS for name in adapter.transformers}


RUNS = re.compile(r"(self\.\w*transformer|current_model)\(\n")
"""Where a pipeline calls its transformer."""


class Source:
    """One pipeline class as its source gives it."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text
        self.parts = text.partition("def __init__(")[2].partition("):\n")[0]

    @cached_property
    def call(self) -> str:
        """Its own call, without comments."""
        (owner,) = ast.parse(self.text).body
        return next(ast.unparse(one) for one in owner.body if getattr(one, "name", "") == "__call__")

    @cached_property
    def adapters(self) -> list[Adapter]:
        """Those of the covered transformer classes that its parts may be."""
        names = [name for name in re.findall(r"\w+", self.parts) if name in ADAPTER_OF]
        return [*{id(ADAPTER_OF[name]): ADAPTER_OF[name] for name in names}.values()]

    @property
    def told(self) -> bool:
        """Whether it opens contexts with known names, follows a guider, or is declared in an adapter's guidance."""
        contexts = set(re.findall(r"cache_context\(\s*\"(\w+)\"", self.text))
        if (contexts and contexts <= set(NAMES)) or re.search(r"\bguider\b", self.parts):
            return True
        return any(declares(adapter, self.name) for adapter in self.adapters)


def classes_of(path: Path) -> list[Source]:
    """Return the classes of a file, which is not parsed: most of diffusers' pipelines are none of ours."""
    matches = re.finditer(r"^class (\w+)(\([^)]*\))?:\n((\s.*)?\n)*", path.read_text(encoding="utf-8"), re.M)
    return [Source(one[1], one[0]) for one in matches]


def declares(adapter: Adapter, name: str) -> bool:
    guidance = adapter.guidance
    fields = (guidance.alone, guidance.in_turn, guidance.together, guidance.own)
    return bool(guidance.branch_of) or any(name in field for field in fields)


@cache
def sources() -> dict[str, Source]:
    """Return the pipeline classes that may hold a covered transformer and have a call of their own."""
    classes = [one for path in sorted((ROOT / "pipelines").rglob("pipeline_*.py")) for one in classes_of(path)]
    return {one.name: one for one in classes if "def __call__(" in one.text and RUNS.search(one.text) and one.adapters}


def require_told(found: Iterable[Source]) -> None:
    untold = sorted(source.name for source in found if not source.told)
    assert not untold, f"read how these guide, and name them in an adapter's guidance: {', '.join(untold)}"


def test_every_pipeline_class_tells_which_prompt_its_forwards_hold():
    assert len(sources()) > 120
    require_told(sources().values())
    new = "class NewPipeline:\n    def __init__(self, transformer: FluxTransformer2DModel):\n        ...\n"
    with pytest.raises(AssertionError, match="guidance: NewPipeline"):
        require_told([Source("NewPipeline", new)])
    modular = {name for name in dir(diffusers) if name.endswith("ModularPipeline")}
    for adapter in ADAPTERS:
        guidance = adapter.guidance
        for name in (*guidance.alone, *guidance.in_turn, *guidance.together, *guidance.own):
            assert name in modular or adapter in sources()[name].adapters, f"{adapter.name}: {name}"


def test_a_declaration_is_what_the_source_does():
    """One forward where all prompts are in one, two where they come in turn; ``latents`` counts a pipeline's rows."""
    for name in {name for adapter in ADAPTERS for name in adapter.guidance.in_turn}:
        text = sources()[name].call
        assert forwards_of(text) >= 2, name
        assert re.search(r"neg\w*|uncond\w*", text), name
        first = re.search(r"(\w+)(?:, \w+)? = self\.transformer\(", text[text.index("enumerate(timesteps)") :]).group(1)
        assert not re.search(r"^neg|uncond", first), f"{name} runs {first} first"
    for name in {name for adapter in ADAPTERS for name in adapter.guidance.together}:
        text = sources()[name].call
        assert forwards_of(text) == (2 if name == "StableDiffusion3Pipeline" else 1), name
        assert re.search(r"\blatents\b", text), name
        assert re.search(r"\* 2|repeat\(2|\[latents, latents\]", text), name
    for name in {name for adapter in ADAPTERS for name in adapter.guidance.alone if name in sources()}:
        assert not re.search(r"negative_prompt_embeds=|noise_pred_uncond|neg_noise", sources()[name].call), name


def forwards_of(text: str) -> int:
    """Count the calls of the transformer in a pipeline's own call."""
    return len(re.findall(r"(?<![\w.])(?:self\.transformer|transformer|current_model)\(", text))


def test_modular_denoisers_follow_a_guider_open_contexts_or_run_in_declared_pipelines():
    without = set()
    for path in sorted((ROOT / "modular_pipelines").rglob("denoise*.py")):
        for one in classes_of(path):
            runs = re.search(r"\b(transformer|current_model)\(\n", one.text)
            if runs and not re.search(r"guider\.prepare_inputs\w*\(|cache_context\(", one.text):
                without.add(path.parent.name)
    # wan_animate_2 builds on a transformer that no adapter covers, ideogram4 has one for each prompt
    assert without == {"flux", "flux2", "flux3", "krea2", "minimax_h3", "ideogram4", "echo", "wan_animate_2"}
    assert {name for one in ADAPTERS for name in one.guidance.alone if name.endswith("ModularPipeline")} == {
        f"{name}ModularPipeline" for name in ("Echo", "Flux", "Flux2", "Flux3Distilled", "Krea2Turbo", "MiniMaxH3")
    }


@cache
def model_classes() -> dict[str, str]:
    """Return class name -> file of every transformer and every U-Net of diffusers, read off the source."""
    files = {}
    for path in sorted([*TRANSFORMERS.glob("*.py"), *(ROOT / "models/unets").glob("*.py")]):
        for name, bases in re.findall(r"^class (\w+)\(([^)]*)\)", path.read_text(encoding="utf-8"), re.M):
            if {one.strip() for one in bases.split(",")} & {"ModelMixin", "LegacyModelMixin"}:
                files[name] = path.name
    return files


def require_covered(classes: Iterable[str]) -> None:
    missing = sorted(set(classes) - set(ADAPTER_OF) - set(NOT_SUPPORTED))
    assert not missing, f"write an adapter or a reason in not_supported.py for {', '.join(missing)}"


def test_every_model_class_has_an_adapter_or_a_reason_and_none_is_older_than_the_code():
    require_covered(model_classes())
    with pytest.raises(AssertionError, match=r"not_supported\.py.*NewTransformer3DModel"):
        require_covered([*model_classes(), "NewTransformer3DModel"])
    assert {*NOT_SUPPORTED, *ADAPTER_OF} <= set(model_classes())
    assert not set(NOT_SUPPORTED) & set(ADAPTER_OF)
    assert all(reason and not reason.endswith(".") for reason in NOT_SUPPORTED.values())
    files = set(model_classes().values())
    for path in sorted(TRANSFORMERS.glob("*.py")):
        if re.search("dispatch_attention_fn|scaled_dot_product_attention", path.read_text(encoding="utf-8")):
            assert path.name in files, f"{path.name} calls attention and no model class was found in it"


def test_attach_and_the_page_say_why_not():
    page = (Path(__file__).parents[2] / "docs/models.md").read_text(encoding="utf-8")
    for name, reason in NOT_SUPPORTED.items():
        pipe = SimpleNamespace(components={"transformer": type(name, (nn.Module,), {})(), "vae": nn.Linear(1, 1)})
        with pytest.raises(UnsupportedModel) as caught:
            dit_accel.attach(pipe)
        held = ", ".join(sorted(["Linear", name]))
        assert str(caught.value).endswith(f" holds {held}; {name} is not supported: {reason}")
        assert re.search(rf"^\|.*`{name}`.*\| {re.escape(reason)} \|$", page, re.M), name
