"""Every image adapter under the checks that its users get, with every method that applies to images."""

import pytest
import tiny_models
from dit_accel_pipelines.families.image_families import IMAGE_ADAPTERS
from shallow_models import shallow
from some_cases import some

from dit_accel.testing import CHECKS, METHOD_CASES, check_adapter

ADAPTERS = {adapter.name: adapter for adapter in IMAGE_ADAPTERS}
FAST = [name for name in CHECKS if name != "compile"]
WITH_METHODS = ("caches", "block caches", "active", "batch", "padding", "pairs", "guidance")
ADAPTER_ALONE = [name for name in FAST if name not in WITH_METHODS]
OF_CALLS = ["caches", "block caches", "guidance"]  # methods around forwards and blocks
OTHERS = [name for name in ADAPTERS if name != "flux"]
MASKED = {
    "qwen-image", "chroma", "krea2", "hunyuan-image", "lumina2", "bria-fibo-2", "nucleus-image", "prx",
    "joyimage-edit-plus", "pixart",
}  # fmt: skip
ADDED_POSITIONS = {  # sinusoidal or learned ones are added to the patches
    "SD3Transformer2DModel", "CogView3PlusTransformer2DModel", "AuraFlowTransformer2DModel", "PixArtTransformer2DModel",
}  # fmt: skip
# Others have the same blocks; HiDream's choose their experts by values: no full graph, untouched either.
BLOCKS = [name for name in ADAPTERS if name not in {"flux-kin", "bria-fibo", "joyimage-edit", "hidream"}]


def check(name, models, only):
    """Check some models of an adapter, and that what passes is what applies."""
    verdicts = check_adapter(ADAPTERS[name], *models, only=only)
    assert len(verdicts) == len(models)
    assert all(list(results) == only for results in verdicts.values())
    applying = set(METHOD_CASES) - set(ADAPTERS[name].refused)
    free = {"padding", "rope"} if ADAPTERS[name].signal else {"padding", "rope", "signal"}
    must = [one for one in only if one not in free and (one != "pairs" or len(applying) > 1)]
    assert all(results[one] == "passed" for results in verdicts.values() for one in must)
    for model, results in verdicts.items():
        if model.partition(" ")[0] in ADDED_POSITIONS:
            assert "rope" not in only or "positions to the patches; leave this method out" in results["rope"]
        else:
            assert results.get("rope", "passed") == "passed"
    return verdicts


@pytest.mark.parametrize("name", some(ADAPTERS, "flux"))
def test_an_image_adapter_passes_every_check(name):
    """Every model under the checks of the adapter alone, the first under those with methods, but for pairs of them."""
    check(name, tiny_models.MODELS[name], ADAPTER_ALONE)
    check(name, tiny_models.MODELS[name][:1], ["active", "batch"])


@pytest.mark.parametrize("name", some(ADAPTERS, "flux"))
def test_image_caches_and_guidance_pass(name):
    check(name, tiny_models.MODELS[name][:1], OF_CALLS)


@pytest.mark.parametrize("name", some(ADAPTERS, "flux", "sd3", "qwen-image", "z-image"))
def test_padding_has_no_influence(name):
    models = tiny_models.MODELS[name]
    verdicts = check(name, models, ["padding"])
    assert any(results["padding"] == "passed" for results in verdicts.values()) == (name in MASKED)


@pytest.mark.parametrize("name", some(ADAPTERS, "flux", slow=("sd3", "qwen-image", "flux2", "hidream")))
def test_pairs_of_methods_pass(name):
    models = tiny_models.MODELS[name]
    check(name, [*map(shallow, models[:1] if name == "flux" else models)], ["pairs"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ADAPTERS if name != "flux" and len(tiny_models.MODELS[name]) > 1])
def test_every_image_model_passes(name):
    check(name, tiny_models.MODELS[name][1:], ["active", "batch"])


@pytest.mark.parametrize("name", some(BLOCKS, slow=("flux", "sd3", "qwen-image", "z-image", "hunyuan-image")))
def test_image_blocks_compile_full_graph(name):
    check_adapter(ADAPTERS[name], tiny_models.MODELS[name][0], only=["compile"])
