"""Every image adapter under the checks that its users get, with every method that applies to images."""

import pytest
import tiny_models
from dit_accel_pipelines.image_families import IMAGE_ADAPTERS

from dit_accel.testing import CHECKS, METHOD_CASES, check_adapter

ADAPTERS = {adapter.name: adapter for adapter in IMAGE_ADAPTERS}
FAST = [name for name in CHECKS if name != "compile"]
MASKED = {
    "qwen-image", "chroma", "krea2", "hunyuan-image", "lumina2", "bria-fibo-2", "nucleus-image", "prx",
    "joyimage-edit-plus", "pixart",
}  # fmt: skip
ADDED_POSITIONS = {  # sinusoidal or learned ones are added to the patches
    "SD3Transformer2DModel", "CogView3PlusTransformer2DModel", "AuraFlowTransformer2DModel", "PixArtTransformer2DModel",
}  # fmt: skip
# Others have the same blocks; HiDream's choose their experts by values: no full graph, untouched either.
BLOCKS = [name for name in ADAPTERS if name not in {"flux-kin", "bria-fibo", "joyimage-edit", "hidream"}]


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_image_adapter_passes_every_check(name):
    models = tiny_models.MODELS[name]
    found = check_adapter(ADAPTERS[name], *models, only=FAST)
    assert len(found) == len(models)
    assert all(list(results) == FAST for results in found.values())
    applying = set(METHOD_CASES) - set(ADAPTERS[name].refused)
    checks = [check for check in FAST if check not in ("padding", "rope") and (check != "pairs" or len(applying) > 1)]
    assert all(results[check] == "passed" for results in found.values() for check in checks)
    for model, results in found.items():
        if model.partition(" ")[0] in ADDED_POSITIONS:
            assert "positions to the patches; leave this method out" in results["rope"]
        else:
            assert results["rope"] == "passed"
    assert any(results["padding"] == "passed" for results in found.values()) == (name in MASKED)


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_image_blocks_compile_full_graph(name):
    check_adapter(ADAPTERS[name], tiny_models.MODELS[name][0], only=["compile"])
