"""Runs the nodes inside ComfyUI's own code and prints what came of it as JSON; a process of its own, given a checkout.

ComfyUI's modules have names such as ``nodes``, read the command line when they are imported and stay for good.
"""

import asyncio
import copy
import inspect
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

CHECKOUT, ROOM, *ASKED = sys.argv[1:]
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, CHECKOUT)

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.model_base  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.patcher_extension  # noqa: E402
import comfy.supported_models  # noqa: E402
import execution  # noqa: E402
import folder_paths  # noqa: E402
import nodes  # noqa: E402
from comfy.ldm.modules import attention  # noqa: E402
from comfy_api.latest import io  # noqa: E402
from comfy_real_places import places  # noqa: E402

WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 256, "num_heads": 2, "ffn_dim": 256, "num_layers": 3,
    "in_dim": 16, "out_dim": 16, "text_dim": 4096, "freq_dim": 256, "patch_size": (1, 2, 2), "eps": 1e-6,
    "window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True,
}  # fmt: skip
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 32,
    "context_in_dim": 64, "hidden_size": 128, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
    "axes_dim": [8, 28, 28], "theta": 10000, "qkv_bias": True, "guidance_embed": False,
}  # fmt: skip
NEUTRAL: dict[str, dict[str, Any]] = {
    "DitAccelSparse": {"options": "block_size = 16\nbeta = -8.0\ndense_layers = 0"},
    "DitAccelCache": {"options": "threshold = 0.0"}, "DitAccelLongVideo": {"trained_frames": 500},
}  # fmt: skip
"""Settings of our nodes that keep everything."""
LEFT_OUT = {
    "CLIPLoader", "DualCLIPLoader", "VAELoader", "VAEDecode", "SaveImage", "SaveAnimatedWEBP", "PreviewAny",
}  # fmt: skip
"""Nodes of our workflows that need files, or only show what came of it."""
CALLS: list[tuple[Any, ...]] = []
TAKEN: dict[str, Any] = {}


def tiny(kind: str) -> Any:
    """Return a model patcher of a tiny model with random weights."""
    config = dict(WAN if kind == "wan" else FLUX)
    made: Any = (comfy.supported_models.WAN21_T2V if kind == "wan" else comfy.supported_models.Flux)(config)
    made.set_inference_dtype(torch.float32, None)
    model = (comfy.model_base.WAN21 if kind == "wan" else comfy.model_base.Flux)(made, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" in name and name.endswith(("weight", "scale")):
            weight.data.fill_(2.0)  # logits that differ, so that it matters which keys are seen
        else:
            weight.data.normal_(std=0.05, generator=generator)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu)


def register(name: str, inputs: list[Any], outputs: list[Any], work: Any, **more: Any) -> None:
    """Register a node that gives what ``work`` makes of its inputs."""

    def define_schema(cls: type) -> Any:
        return io.Schema(node_id=name, category="test", inputs=inputs, outputs=outputs, **more)

    def execute(cls: type, **given: Any) -> Any:
        return io.NodeOutput(*work(**given))

    methods = {"define_schema": classmethod(define_schema), "execute": classmethod(execute)}
    nodes.NODE_CLASS_MAPPINGS[name] = type(name, (io.ComfyNode,), methods)


def text_features(channels: int, seed: int) -> tuple[Any]:
    """Return random text features."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(1, 9, channels, generator=generator)
    return ([[text, {"pooled_output": torch.randn(1, 32, generator=generator)}]],)


def counting(model: Any) -> tuple[Any]:
    """Put another pack's override of attention on a model, which counts its calls and computes as before."""
    model = model.clone()

    def override(func: Any, *args: Any, **kwargs: Any) -> Any:
        CALLS.append(tuple(args[0].shape))
        return func(*args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = override
    return (model,)


def take(latent: Any, report: str = "") -> tuple[()]:
    """Keep a latent and a report where the script finds them."""
    TAKEN.update(latent=latent["samples"], report=report)
    return ()


def register_all() -> None:
    """Register the nodes of the tests' graphs."""
    model, text = [io.Model.Output()], [io.Int.Input("channels"), io.Int.Input("seed")]
    register("TinyModel", [io.String.Input("kind")], model, lambda kind: (tiny(kind),))
    register("TinyText", text, [io.Conditioning.Output()], text_features)
    register("Counting", [io.Model.Input("model")], model, counting)
    taken = [io.Latent.Input("latent"), io.String.Input("report", optional=True)]
    register("Take", taken, [], take, is_output_node=True)


class Server:
    """What the executor asks of a web server: nothing happens."""

    client_id, last_node_id = None, None

    def send_sync(self, *args: Any) -> None: ...


def run(graph: dict[str, Any]) -> dict[str, Any]:
    """Run a graph in ComfyUI's executor; return what `Take` kept."""
    TAKEN.clear()
    CALLS.clear()
    found = asyncio.run(execution.validate_prompt("test", graph, None))
    assert found[0], found
    executor = execution.PromptExecutor(Server())
    executor.execute(graph, "test", {}, found[2])
    assert executor.success, [str(value)[:2000] for value in executor.status_messages[-1][1].values()]
    return dict(TAKEN)


def shrunk(name: str, wan_file: str | None) -> dict[str, Any]:
    """Return a workflow of ours on a tiny model: other loaders and text, a smaller latent, few steps, no decoder."""
    graph = json.loads((Path(ROOM) / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    flux = name.startswith("flux")
    for number, node in list(graph.items()):
        kind = node["class_type"]
        if kind == "UNETLoader" and not (wan_file and not flux):
            graph[number] = {"class_type": "TinyModel", "inputs": {"kind": "flux" if flux else "wan"}}
        elif kind == "UNETLoader":
            node["inputs"]["unet_name"] = wan_file
        elif kind == "CLIPTextEncode":
            channels = 64 if flux else 4096
            graph[number] = {"class_type": "TinyText", "inputs": {"channels": channels, "seed": int(number)}}
        elif kind.startswith("Empty"):
            long = {"length": 41 if "long" in name else 21} if "length" in node["inputs"] else {}
            node["inputs"] |= {"width": 256 if flux else 128, "height": 256 if flux else 128, **long}
        elif kind == "KSampler":
            node["inputs"] |= {"steps": 6, "sampler_name": "euler", "cfg": 1.0 if flux else 3.0}
        elif kind == "DitAccelSparse":
            node["inputs"] |= {"min_tokens": 1, "options": "block_size = 16\ndense_layers = 0"}
        elif kind == "DitAccelLongVideo":
            node["inputs"] |= {"trained_frames": 5}
        elif kind == "DitAccelCache":
            node["inputs"] |= {"options": "threshold = 0.6"}
        elif kind in LEFT_OUT:
            del graph[number]
    graph["30"] = {"class_type": "Take", "inputs": {"latent": ["21", 0], "report": ["21", 1]}}
    return graph


def without_ours(graph: dict[str, Any], *kept: str) -> dict[str, Any]:
    """Return a graph in which our nodes, but for some, are taken out and what they were given goes on."""
    graph, through = copy.deepcopy(graph), {}
    for number in sorted(graph, key=int):
        node = graph[number]
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in through:
                node["inputs"][name] = through[value[0]]
        if node["class_type"].startswith("DitAccel") and node["class_type"] not in kept:
            through[number] = node["inputs"]["latent" if node["class_type"] == "DitAccelReport" else "model"]
    graph["30"]["inputs"].pop("report", None) if "DitAccelReport" not in kept else None
    return {number: node for number, node in graph.items() if number not in through}


def with_node(graph: dict[str, Any], after: str, kind: str, **inputs: Any) -> dict[str, Any]:
    """Return a graph with one more node on a model's way, right behind another node."""
    graph = copy.deepcopy(graph)
    for node in graph.values():
        if node["inputs"].get("model") == [after, 0]:
            node["inputs"]["model"] = ["40", 0]
    graph["40"] = {"class_type": kind, "inputs": {"model": [after, 0], **inputs}}
    return graph


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the largest difference of two latents over the largest value."""
    a, b = one["latent"], other["latent"]
    return float((a - b).abs().max() / b.abs().max())


def signatures() -> dict[str, str]:
    """Return the signatures on which the door stands."""
    patcher, wrappers = comfy.model_patcher.ModelPatcher, comfy.patcher_extension.WrappersMP
    from comfy.ldm.flux.model import Flux
    from comfy.ldm.wan.model import WanModel

    def names(function: Any) -> str:
        return ", ".join(inspect.signature(function).parameters)

    return {
        "attention": names(attention.attention_pytorch),
        "add_wrapper_with_key": names(patcher.add_wrapper_with_key),
        "remove_wrappers_with_key": names(patcher.remove_wrappers_with_key),
        "outer_sample": wrappers.OUTER_SAMPLE,
        "diffusion_model": wrappers.DIFFUSION_MODEL,
        "wan": names(WanModel._forward),
        "flux": names(Flux._forward),
    }


def workflow(name: str, wan_file: str | None) -> dict[str, Any]:
    """Return what a workflow gives with our nodes, without them, and with all kept or another override beside."""
    graph = shrunk(name, wan_file)
    plain = run(without_ours(graph))
    ours, again = run(graph), run(graph)
    neutral, bad = copy.deepcopy(graph), copy.deepcopy(graph)
    for one, other in zip(neutral.values(), bad.values(), strict=True):
        one["inputs"] |= NEUTRAL.get(one["class_type"], {})
        if "options" in other["inputs"]:
            other["inputs"]["options"] = "no_such_option = 1"
    kept = run(neutral)
    first = run(with_node(graph, "1", "Counting"))
    before = len(CALLS)
    last = run(with_node(graph, "11", "Counting"))
    after = len(CALLS)
    refused = run(bad)
    return {
        "distance": distance(ours, plain), "again": distance(again, ours), "neutral": distance(kept, plain),
        "report": ours["report"], "first": distance(first, ours), "last": distance(last, ours),
        "passed_on": before, "passed_on_last": after, "refused": distance(refused, plain),
        "refused_report": refused["report"],
    }  # fmt: skip


def compiled() -> dict[str, Any]:
    """Return how far compiled Wan's sampling with our nodes is from the same that is not compiled."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    def work(model: Any) -> tuple[Any]:
        model = model.clone()
        set_torch_compile_wrapper(model, backend="eager")
        return (model,)

    register("Compile", [io.Model.Input("model")], [io.Model.Output()], work)
    graph = shrunk("wan-sparse-cache", None)
    ours, fast = run(graph), run(with_node(graph, "11", "Compile"))
    return {"distance": distance(fast, ours), "report": fast["report"]}


def beside(folder: Path, wan_file: str) -> dict[str, Any]:
    """Return what our sparse attention gives beside ComfyUI's own EasyCache, and on a model with a LoRA."""
    from safetensors.torch import save_file

    graph = without_ours(shrunk("wan-sparse-cache", wan_file), "DitAccelSparse", "DitAccelReport")
    settings = {"reuse_threshold": 1.0, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
    ours, theirs = run(graph), run(with_node(graph, "10", "EasyCache", **settings))
    generator = torch.Generator().manual_seed(5)
    lora = {
        f"diffusion_model.blocks.{block}.self_attn.{part}.lora_{side}.weight": torch.randn(shape, generator=generator)
        for block in range(3)
        for part in "qv"
        for side, shape in (("A", (4, 256)), ("B", (256, 4)))
    }
    save_file(lora, str(folder / "tiny_lora.safetensors"))
    folder_paths.add_model_folder_path("loras", str(folder))
    loaded = run(with_node(graph, "1", "LoraLoaderModelOnly", lora_name="tiny_lora.safetensors", strength_model=0.1))
    windows = {
        "context_length": 9, "context_overlap": 4, "context_schedule": "standard_static", "context_stride": 1,
        "closed_loop": False, "fuse_method": "pyramid",
    }  # fmt: skip
    kept = copy.deepcopy(graph)
    kept["10"]["inputs"] |= NEUTRAL["DitAccelSparse"]
    cut = [run(with_node(one, "1", "WanContextWindowsManual", **windows)) for one in (kept, without_ours(graph))]
    return {
        "windows": distance(*cut), "windows_report": cut[0]["report"],
        "report": theirs["report"], "skipped_by_theirs": theirs["report"].count("skipped by another node"),
        "lora": distance(loaded, ours), "lora_report": loaded["report"],
    }  # fmt: skip


def saved_wan(folder: Path) -> str:
    """Write a tiny Wan checkpoint where ComfyUI's own loader finds it, and return its name."""
    from safetensors.torch import save_file

    weights = {name: value.contiguous() for name, value in tiny("wan").model.diffusion_model.state_dict().items()}
    save_file(weights, str(folder / "tiny_wan.safetensors"))
    folder_paths.add_model_folder_path("diffusion_models", str(folder))
    return "tiny_wan.safetensors"


def main() -> None:
    """Load the nodes as ComfyUI loads custom ones, do what is asked and print it."""
    asyncio.run(nodes.init_builtin_extra_nodes())
    assert asyncio.run(nodes.load_custom_node(str(Path(ROOM)), module_parent="custom_nodes"))
    register_all()
    found: dict[str, Any] = {"signatures": signatures()}
    with tempfile.TemporaryDirectory() as folder:
        wan_file = saved_wan(Path(folder))
        for name in ASKED:
            if name == "compiled":
                found[name] = compiled()
            elif name == "places":
                found[name] = places(
                    {of: tiny(kind).model.diffusion_model for of, kind in (("Flux", "flux"), ("WanModel", "wan"))}
                )
            elif name == "beside":
                found[name] = beside(Path(folder), wan_file)
            else:
                found[name] = workflow(name, wan_file)
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
