"""The nodes in ComfyUI's own code: its loader, its graph executor, our workflows on tiny models.

``DIT_ACCEL_COMFYUI`` names a checkout whose requirements are installed; without it these are skipped.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import comfy_stand_in
import pytest
from dit_accel_comfyui.placing import TEXT

ROOT = Path(__file__).parents[2]
ROOM = ROOT / "comfyui"
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


def test_the_stand_ins_have_its_signatures():
    assert found()["signatures"] == comfy_stand_in.SIGNATURES


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
