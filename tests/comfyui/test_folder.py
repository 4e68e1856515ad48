"""The folder as its users get it: version, needs, and what ComfyUI finds in it."""

import ast
import asyncio
import importlib.util
import json
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dit_accel import SolAttention

ROOM = Path(__file__).parents[2] / "comfyui"


def test_version_and_needs_are_those_of_the_other_distributions():
    project = tomllib.loads((ROOM / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    version = (ROOM.parent / "kernels" / "VERSION").read_text(encoding="utf-8").strip()
    assert project["version"] == version
    assert project["dependencies"] == [f"dit-accel~={version}"]
    assert (ROOM / "requirements.txt").read_text(encoding="utf-8").split() == project["dependencies"]
    assert (ROOM / "LICENSE").read_bytes() == (ROOM.parent / "LICENSE").read_bytes()


def test_the_folder_is_imported_by_a_name_of_comfyuis_and_without_it(monkeypatch):
    spec = importlib.util.spec_from_file_location("custom_nodes_x", ROOM / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "custom_nodes_x", module)
    spec.loader.exec_module(module)
    assert asyncio.iscoroutinefunction(module.comfy_entrypoint)


def workflows() -> list[list[dict]]:
    """The nodes of each committed workflow."""
    paths = (ROOM / "workflows").glob("*.json")
    return [list(json.loads(path.read_text(encoding="utf-8")).values()) for path in paths]


class Part:
    """What ComfyUI's node API makes of a node's description."""

    def __init__(self, *args: Any, **given: Any) -> None:
        self.args, self.given = args, given


def test_sparse_attention_waits_for_as_many_tokens_as_the_pages_say(monkeypatch):
    """The node as it is put down, the pages, and the workflows, which are long enough."""
    least, acting = SolAttention.worthwhile_tokens, []
    names = ("Model", "Combo", "Float", "Int", "String", "Latent")
    kinds = dict.fromkeys(names, SimpleNamespace(Input=Part, Output=Part))
    api = SimpleNamespace(ComfyExtension=object, io=SimpleNamespace(ComfyNode=object, Schema=Part, **kinds), ui=None)
    monkeypatch.setitem(sys.modules, "comfy_api", SimpleNamespace(latest=api))
    monkeypatch.setitem(sys.modules, "comfy_api.latest", api)
    schema = importlib.import_module("dit_accel_comfyui.nodes").Sparse.define_schema()
    monkeypatch.delitem(sys.modules, "dit_accel_comfyui.nodes")
    assert {one.args[0]: one.given.get("default") for one in schema.given["inputs"]}["min_tokens"] == least
    for nodes in workflows():
        graph = {node["class_type"]: node["inputs"] for node in nodes}
        if sparse := graph.get("DitAccelSparse"):
            size = graph["EmptyHunyuanLatentVideo"]
            tokens = (size["width"] // 16) * (size["height"] // 16) * ((size["length"] - 1) // 4 + 1)
            acting.append((sparse["min_tokens"], tokens >= least))
    assert acting == [(least, True)] * 2
    pages = (ROOM / "README.md", *(ROOM.parent / "docs" / name for name in ("start/comfyui.md", "methods/sol.md")))
    assert all(f"{least:,}" in page.read_text(encoding="utf-8") for page in pages)


def test_the_nodes_reach_into_the_core_by_its_engine_alone():
    """It makes the contexts, too."""
    for path in (ROOM / "dit_accel_comfyui").glob("*.py"):
        assert "Context(" not in path.read_text(encoding="utf-8"), path.name
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imports = {one.module for one in ast.walk(tree) if isinstance(one, ast.ImportFrom) and not one.level}
        rooms = {name for name in imports if str(name).startswith("dit_accel.attachment")}
        assert rooms <= {"dit_accel.attachment.engine", "dit_accel.attachment.host"}, path.name
        private = {
            one.attr
            for one in ast.walk(tree)
            if isinstance(one, ast.Attribute) and one.attr.startswith("_") and not one.attr.startswith("__")
            and not (isinstance(one.value, ast.Name) and one.value.id == "self")
        }  # fmt: skip
        assert private <= {"_C", "_dynamo"}, (path.name, private)


def test_workflows_name_methods_that_there_are():
    from dit_accel_comfyui.patch import method_config

    ours = [node["inputs"] for nodes in workflows() for node in nodes if node["class_type"].startswith("DitAccel")]
    names = {method_config(inputs["method"], inputs["options"], {}).name for inputs in ours if "method" in inputs}
    assert {"sol", "ultravico", "easycache"} <= names
