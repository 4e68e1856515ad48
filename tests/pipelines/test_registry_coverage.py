"""Every transformer class of the installed diffusers is covered by an adapter or listed with the reason why not."""

import ast
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
from dit_accel_pipelines.families.not_supported import NOT_SUPPORTED
from torch import nn

import dit_accel
from dit_accel import UnsupportedModel
from dit_accel.adapters import installed

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
