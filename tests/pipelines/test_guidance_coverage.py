"""Every transformer of diffusers is covered or listed with a reason, and every pipeline class tells its prompts."""

import ast
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
from dit_accel_pipelines import ADAPTERS
from dit_accel_pipelines.families.not_supported import NOT_SUPPORTED
from torch import nn

import dit_accel
from dit_accel import UnsupportedModel
from dit_accel.adapters import installed
from dit_accel.adapters.adapter import Adapter
from dit_accel.methods.prompt_branches import NAMES

ROOT = Path(diffusers.__file__).parent
ADAPTER_OF = {name: adapter for adapter in ADAPTERS for name in adapter.transformers}
BY_GUIDER = "guider"
"""What guides where a pipeline holds one of diffusers' guiders."""


class Source:
    """One pipeline class as its source gives it."""

    def __init__(self, node: ast.ClassDef, lines: list[str]) -> None:
        self.name = node.name
        self.bases = [ast.unparse(base).rsplit(".", 1)[-1] for base in node.bases]
        self.functions = {one.name: one for one in node.body if isinstance(one, ast.FunctionDef)}
        self.text = "\n".join(lines[node.lineno - 1 : node.end_lineno])

    @property
    def transformers(self) -> set[str]:
        """The covered transformer classes that its parts may be."""
        init = self.functions.get("__init__")
        return (
            set()
            if init is None
            else {name for name in re.findall(r"\w+", ast.unparse(init.args)) if name in ADAPTER_OF}
        )

    @property
    def contexts(self) -> set[str]:
        """The names of the contexts that it opens."""
        return set(re.findall(r"cache_context\(\s*\"(\w+)\"", self.text))

    @property
    def left_to_guider(self) -> bool:
        """Whether its contexts, or its forwards, follow a guider."""
        init = self.functions.get("__init__")
        return init is not None and BY_GUIDER in {one.arg for one in init.args.args}


@cache
def sources() -> dict[str, Source]:
    """Return the pipeline classes that may hold a covered transformer and have a call of their own."""
    found = {}
    for path in sorted((ROOT / "pipelines").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef):
                source = Source(node, lines)
                runs = re.search(r"(self\.\w*transformer|current_model)\(\n", source.text)
                if "__call__" in source.functions and source.transformers and runs:
                    found[source.name] = source
    return found


def adapters_of(source: Source) -> list[Adapter]:
    return [*{id(ADAPTER_OF[name]): ADAPTER_OF[name] for name in source.transformers}.values()]


def declared(name: str, adapter: Adapter) -> str | None:
    guidance = adapter.guidance
    if guidance.branch_of:
        return "branch_of"
    fields = ("alone", "in_turn", "together", "own")
    return next((field for field in fields if name in getattr(guidance, field)), None)


def require_told(found: Iterable[Source]) -> None:
    """Fail for a class that neither opens contexts with known names, nor has a guider, nor is declared."""
    untold = sorted(
        source.name
        for source in found
        if not (source.contexts and source.contexts <= set(NAMES))
        and not source.left_to_guider
        and not any(declared(source.name, adapter) for adapter in adapters_of(source))
    )
    assert not untold, f"read how these guide, and name them in an adapter's guidance: {', '.join(untold)}"


def test_every_pipeline_class_tells_which_prompt_its_forwards_hold():
    assert len(sources()) > 120
    require_told(sources().values())


def test_a_new_class_that_tells_nothing_is_named():
    text = (
        "class NewPipeline:\n"
        "    def __init__(self, transformer: FluxTransformer2DModel): ...\n"
        "    def __call__(self): ...\n"
    )
    new = Source(ast.parse(text).body[0], text.splitlines())
    with pytest.raises(AssertionError, match="guidance: NewPipeline"):
        require_told([new])


def test_no_declaration_outlives_its_class():
    modular = {name for name in dir(diffusers) if name.endswith("ModularPipeline")}
    for adapter in ADAPTERS:
        guidance = adapter.guidance
        for name in (*guidance.alone, *guidance.in_turn, *guidance.together, *guidance.own):
            assert name in modular or adapter in adapters_of(sources()[name]), f"{adapter.name}: {name}"


def forwards_of(source: Source) -> int:
    """Count the calls of the transformer in a pipeline's own call."""
    called = (ast.unparse(one.func) for one in ast.walk(source.functions["__call__"]) if isinstance(one, ast.Call))
    return sum(name in ("self.transformer", "transformer", "current_model") for name in called)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=[adapter.name for adapter in ADAPTERS])
def test_a_declaration_is_what_the_source_does(adapter):
    """One forward where all prompts are in one, two where they come in turn; ``latents`` counts a pipeline's rows."""
    for name in adapter.guidance.in_turn:
        text = ast.unparse(sources()[name].functions["__call__"])
        assert forwards_of(sources()[name]) >= 2, name
        assert re.search(r"neg\w*|uncond\w*", text), name
        first = re.search(r"(\w+)(?:, \w+)? = self\.transformer\(", text[text.index("enumerate(timesteps)") :]).group(1)
        assert not re.search(r"^neg|uncond", first), f"{name} runs {first} first"
    for name in adapter.guidance.together:
        call = sources()[name].functions["__call__"]
        assert forwards_of(sources()[name]) == (2 if name == "StableDiffusion3Pipeline" else 1), name
        assert "latents" in {one.id for one in ast.walk(call) if isinstance(one, ast.Name)}, name
        assert re.search(r"\* 2|repeat\(2|\[latents, latents\]", ast.unparse(call)), name
    for name in adapter.guidance.alone:
        if name in sources():
            assert not re.search(
                r"negative_prompt_embeds=|noise_pred_uncond|neg_noise",
                ast.unparse(sources()[name].functions["__call__"]),
            ), name


def test_guiders_take_the_conditional_prompt_first():
    from diffusers import guiders

    classes = [one for one in vars(guiders).values() if isinstance(one, type) and issubclass(one, guiders.BaseGuidance)]
    known = [one._input_predictions for one in classes if one._input_predictions is not None]
    assert len(known) > 8
    assert all(names[0] == "pred_cond" and set(names) <= set(NAMES) for names in known)


def test_modular_denoisers_follow_a_guider_open_contexts_or_run_in_declared_pipelines():
    without = {}
    for path in sorted((ROOT / "modular_pipelines").rglob("denoise*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            called = [ast.unparse(one.func) for one in ast.walk(node) if isinstance(one, ast.Call)]
            runs = any(re.search(r"\b(transformer|current_model)$", name) for name in called)
            told = any(re.search(r"guider\.prepare_inputs|cache_context$", name) for name in called)
            if isinstance(node, ast.ClassDef) and runs and not told:
                without.setdefault(path.parent.name, []).append(node.name)
    # wan_animate_2 builds on a transformer that no adapter covers, ideogram4 has one for each prompt
    assert set(without) == {"flux", "flux2", "flux3", "krea2", "minimax_h3", "ideogram4", "echo", "wan_animate_2"}
    declared_modular = {name for one in ADAPTERS for name in one.guidance.alone if name.endswith("ModularPipeline")}
    assert declared_modular == {
        "EchoModularPipeline", "FluxModularPipeline",
        "Flux2ModularPipeline", "Flux3DistilledModularPipeline", "Krea2TurboModularPipeline",
        "MiniMaxH3ModularPipeline",
    }  # fmt: skip


MODELS = Path(diffusers.__file__).parent / "models"
TRANSFORMERS = MODELS / "transformers"


@cache
def model_classes() -> dict[str, str]:
    """Return class name -> file of every transformer and every U-Net of diffusers, read off the source."""
    found = {}
    for path in sorted([*TRANSFORMERS.glob("*.py"), *(MODELS / "unets").glob("*.py")]):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            bases = {ast.unparse(base) for base in node.bases} if isinstance(node, ast.ClassDef) else set()
            if bases & {"ModelMixin", "LegacyModelMixin"}:
                found[node.name] = path.name
    return found


def supported() -> set[str]:
    return {name for adapter in installed.adapters().values() for name in adapter.transformers}


def assert_covered(classes: Iterable[str]) -> None:
    missing = sorted(set(classes) - supported() - set(NOT_SUPPORTED))
    assert not missing, f"write an adapter or a reason in not_supported.py for {', '.join(missing)}"


def test_every_class_has_an_adapter_or_a_reason():
    assert_covered(model_classes())


def test_a_new_class_is_named():
    with pytest.raises(AssertionError, match=r"not_supported\.py.*NewTransformer3DModel"):
        assert_covered([*model_classes(), "NewTransformer3DModel"])


def test_files_that_call_attention_hold_a_known_class():
    files = set(model_classes().values())
    for path in sorted(TRANSFORMERS.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "dispatch_attention_fn" in text or "scaled_dot_product_attention" in text:
            assert path.name in files, f"{path.name} calls attention and no model class was found in it"


def test_the_list_of_reasons_is_no_older_than_the_code():
    assert not set(NOT_SUPPORTED) & supported()
    assert all(reason and not reason.endswith(".") for reason in NOT_SUPPORTED.values())
    assert list(NOT_SUPPORTED) == sorted(NOT_SUPPORTED)


def test_attach_and_the_page_say_why_not():
    page = (Path(__file__).parents[2] / "docs/models.md").read_text(encoding="utf-8")
    for name, reason in NOT_SUPPORTED.items():
        pipe = SimpleNamespace(components={"transformer": type(name, (nn.Module,), {})(), "vae": nn.Linear(1, 1)})
        with pytest.raises(UnsupportedModel) as found:
            dit_accel.attach(pipe)
        held = ", ".join(sorted(["Linear", name]))
        assert str(found.value).endswith(f" holds {held}; {name} is not supported: {reason}")
        assert re.search(rf"^\|.*`{name}`.*\| {re.escape(reason)} \|$", page, re.M), name


def test_no_reason_outlives_its_class():
    assert set(NOT_SUPPORTED) <= set(model_classes())
    assert supported() <= set(model_classes())
