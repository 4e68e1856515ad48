"""The folder as its users get it, and the nodes in ComfyUI's own code, where ``DIT_ACCEL_COMFYUI`` names a checkout."""

import ast
import asyncio
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy_stand_in
import pytest
from dit_accel_comfyui.placing import TEXT

from dit_accel import SolAttention

ROOT = Path(__file__).parents[2]
ROOM = ROOT / "comfyui"


def test_version_and_needs_are_those_of_the_other_distributions():
    project = tomllib.loads((ROOM / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    version = (ROOT / "kernels" / "VERSION").read_text(encoding="utf-8").strip()
    assert project["version"] == version
    assert project["dependencies"] == [f"dit-accel~={version}"]
    assert (ROOM / "requirements.txt").read_text(encoding="utf-8").split() == project["dependencies"]
    assert (ROOM / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


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
    pages = (ROOM / "README.md", *(ROOT / "docs" / name for name in ("start/comfyui.md", "methods/sol.md")))
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


WORKFLOWS = sorted(path.stem for path in (ROOM / "workflows").glob("*.json"))


@functools.cache
def found():
    """Return what the script printed; skip where there is no ComfyUI or it lacks a requirement."""
    checkout = os.environ.get("DIT_ACCEL_COMFYUI")
    if not checkout or not (Path(checkout) / "comfy" / "patcher_extension.py").exists():
        pytest.skip("DIT_ACCEL_COMFYUI names no checkout of ComfyUI")
    script = ROOT / "tests" / "support" / "comfy_real.py"
    command = [sys.executable, str(script), checkout, str(ROOM), *WORKFLOWS, "compiled", "beside", "places"]
    paths = os.pathsep.join([str(ROOM), *(str(ROOT / part) for part in ("", "kernels", "pipelines", "eval", "assets"))])
    kept = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, env=kept, capture_output=True, text=True, timeout=550)
    last = done.stderr[-500:]
    if done.returncode and "ModuleNotFoundError" in last and "No module named 'dit_accel" not in last:
        pytest.skip(f"ComfyUI lacks a requirement: {done.stderr.strip().splitlines()[-1]}")
    assert not done.returncode, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_runs_and_keeps_its_contract(name):
    run = found()[name]
    assert run["distance"] > 0.01, "our nodes changed nothing"
    assert run["neutral"] < 1e-5, "settings that keep everything must give what ComfyUI gives"
    assert run["again"] == 0, "a second run must be as the first"
    assert run["first"] == run["last"] == 0, "another override must change nothing, wherever its node stands"
    assert run["passed_on"] == run["passed_on_last"] > 0
    assert run["refused"] == 0, "refused settings must leave the model as it was, to the bit"
    assert "no_such_option" in run["refused_report"]
    assert ("layers at" in run["report"]) == ("sparse" in name or "long" in name)


def test_a_compiled_model_gives_the_same_and_comfyuis_own_cache_lora_and_windows_work_beside_ours():
    compiled, run = found()["compiled"], found()["beside"]
    assert found()["signatures"] == comfy_stand_in.SIGNATURES
    assert compiled["distance"] < 1e-5
    assert run["skipped_by_theirs"] > 0
    assert run["lora"] > 0.001
    for told in (compiled["report"], run["report"], run["lora_report"]):
        assert "layers at" in told
    assert run["windows"] < 1e-5
    for name in ("uncond_cond  ", "uncond_cond 2", "uncond_cond 3"):
        assert run["windows_report"].count(name) == 6


@pytest.mark.parametrize("name", [*sorted(TEXT), "LTXVModel", "MiniTrainDIT", "WanModel"])
def test_tokens_stand_where_the_package_says(name):
    run = found()["places"][name]
    assert run["text"] == (7 if name in TEXT else 0)
    assert run["equal"], "the queries that change with the text are not those that the package takes for it"
    assert run["pixel"] == [run["token"]], "the query that changes with a pixel is not the one of its place"


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_names_our_nodes_and_every_link_leads_somewhere(name):
    graph = json.loads((ROOM / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    assert {node["class_type"] for node in graph.values()} >= {"DitAccelReport"}
    links = [value[0] for node in graph.values() for value in node["inputs"].values() if isinstance(value, list)]
    assert set(links) <= set(graph)
