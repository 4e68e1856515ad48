"""The folder as its users get it: version, needs, and what ComfyUI finds in it."""

import asyncio
import importlib.util
import json
import sys
import tomllib
from pathlib import Path

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


def test_workflows_name_methods_that_there_are():
    from dit_accel_comfyui.door import method_config

    found = []
    for path in (ROOM / "workflows").glob("*.json"):
        for node in json.loads(path.read_text(encoding="utf-8")).values():
            if "method" in node["inputs"] and node["class_type"].startswith("DitAccel"):
                found.append(method_config(node["inputs"]["method"], node["inputs"]["options"], {}).name)
    assert {"sol", "ultravico", "easycache"} <= set(found)
