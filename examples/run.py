"""Runs an example: python examples/run.py flux_4k.py. With DIT_ACCEL_EXAMPLES=tiny on a tiny model and a CPU, as in CI.

Then whatever loads a model gets one of its class that ships with the project, or one of random weights (HunyuanVideo);
sizes and steps shrink, devices become the CPU, and the example runs in a folder of its own with the files that it
reads. The scripts know nothing of it.
"""

import contextlib
import contextvars
import functools
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

SWITCH = "DIT_ACCEL_EXAMPLES"
HERE = Path(__file__).resolve().parent
EMBEDDED = {"Wan": "wan-tiny", "Flux": "flux-tiny"}
"""How the name of a pipeline class begins -> the embedded model that stands in."""

STEPS = 12
PROMPTS = (
    "a red circle moving right\na blue square moving up\na green triangle moving down\na yellow circle moving left\n"
)
SPACE = """version = 2
name = "space"
model = "wan-tiny"
prompts = ["unused"]
[[arm]]
name = "unipc"
num_inference_steps = [4]
[[arm]]
name = "cached"
num_inference_steps = [12]
easycache = { threshold = 0.2 }
"""
COMMAND = """
import functools
from dit_accel.cli import main
from dit_accel_eval.suites import reference
reference.converged = functools.partial(reference.converged, first=4, most=8)
main()
"""
"""The command line, content with a reference of few steps."""

_shrunk = contextvars.ContextVar("shrunk", default=False)
"""Whether the sizes of the call that runs are small already."""


def smaller(given: dict[str, Any], *, video: bool) -> dict[str, Any]:
    """Return a call's arguments for a tiny model: what is longer or larger than trained still is."""
    small = {**given, "num_inference_steps": STEPS}
    if video:
        small |= {"height": 32, "width": 64, "num_frames": 33 if given.get("num_frames", 1) > 129 else 17}
    else:
        side = 144 if given.get("height", 1024) > 2048 else 64
        small |= {"height": side, "width": side}
    if "image" in given:
        small["image"] = [picture.resize((64, 64)) for picture in given["image"]]
    return small


def once(call: Callable[..., Any], video: Callable[[Any], bool]) -> Callable[..., Any]:
    """Return a method that runs with smaller arguments, unless it runs inside one that does."""

    @functools.wraps(call)
    def __call__(self: Any, *args: Any, **given: Any) -> Any:  # noqa: N807 - pipelines are told by this name
        if _shrunk.get():
            return call(self, *args, **given)
        token = _shrunk.set(True)
        try:
            return call(self, *args, **smaller(given, video=video(self)))
        finally:
            _shrunk.reset(token)

    return __call__


def hunyuan_video() -> Any:
    """Return a tiny HunyuanVideo of random weights, which gives every prompt the same embeddings."""
    sys.path.append(str(HERE.parent / "tests" / "support"))
    from diffusers import HunyuanVideoPipeline
    from tiny_parts import assemble
    from tiny_video_kits import hunyuan_video

    pipe, given = assemble(HunyuanVideoPipeline, hunyuan_video())
    texts = (given["prompt_embeds"], given["pooled_prompt_embeds"], given["prompt_attention_mask"])
    pipe.encode_prompt = lambda *_, **__: texts
    return pipe


def load(original: Any) -> Any:
    """Return what stands in for ``from_pretrained``."""

    def from_pretrained(cls: type, name: str, **_: Any) -> Any:
        import torch
        from dit_accel_assets import model_path

        tiny = next((tiny for kind, tiny in EMBEDDED.items() if cls.__name__.startswith(kind)), None)
        pipe = original(cls, model_path(tiny), dtype=torch.float32) if tiny else hunyuan_video()
        pipe.set_progress_bar_config(disable=True)
        call = once(cls.__call__, video=lambda _: tiny != "flux-tiny")
        pipe.__class__ = type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})
        return pipe

    return classmethod(from_pretrained)


def lora(pipe: Any, *_: Any, adapter_name: str, **__: Any) -> None:
    """Stand in for a LoRA of the hub by one of random weights."""
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, adapter_name)


def command(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return `subprocess.run` that runs our commands on the embedded model, in this Python."""

    def smaller_run(args: list[str], **given: Any) -> Any:
        if args[0] != "dit-accel":
            return run(args, **given)
        small = {"--model": "wan-tiny", "--height": "32", "--width": "32", "--num-frames": "5", "--target": "psnr=25"}
        args = [small.get(before, arg) for before, arg in zip(["", *args], args, strict=False)]
        Path("space.toml").write_text(SPACE)
        kept = {**os.environ, "XDG_CACHE_HOME": "cache"}  # so that `recommend` never hears of it
        return run([sys.executable, "-c", COMMAND, *args[1:], "--space", "space.toml"], env=kept, **given)

    return smaller_run


@contextlib.contextmanager
def tiny() -> Iterator[None]:
    """Let examples run on tiny models inside the block."""
    import torch
    import torch.distributed as dist
    from diffusers import DiffusionPipeline, FluxPipeline, WanPipeline

    import dit_accel

    to, group, join = DiffusionPipeline.to, DiffusionPipeline.enable_group_offload, dist.init_process_group

    def offload(pipe: Any, *, onload_device: Any, offload_type: str, **_: Any) -> None:
        group(pipe, torch.device("cpu"), offload_type=offload_type)

    def video(attachment: dit_accel.Attachment) -> bool:
        return "flux" not in str(attachment.report().model)

    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in (
            (DiffusionPipeline, "from_pretrained", load(DiffusionPipeline.from_pretrained.__func__)),
            (DiffusionPipeline, "to", lambda pipe, *args, **own: pipe if "cuda" in args else to(pipe, *args, **own)),
            (DiffusionPipeline, "enable_model_cpu_offload", lambda pipe: None),
            (DiffusionPipeline, "enable_group_offload", offload),
            (dit_accel.Attachment, "call", once(dit_accel.Attachment.call, video)),
            (torch.cuda, "set_device", lambda _: None),
            (dist, "init_process_group", lambda _: join("gloo")),
            (torch.accelerator, "device_count", lambda: 1),  # what diffusers divides a process's number by
            (subprocess, "run", command(subprocess.run)),
            (WanPipeline, "load_lora_weights", lora),
            (FluxPipeline, "load_lora_weights", lora),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        yield


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """Make a folder with the files that examples read, and run there inside the block."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as made, contextlib.chdir(made):
        Path("prompts.txt").write_text(PROMPTS)
        Path("pictures").mkdir()
        for number, color in enumerate(("red", "navy", "white", "green", "gold")):
            Image.new("RGB", (128, 96), color).save(f"pictures/{number}.png")
        yield Path(made)


def main() -> None:
    """Run the example that is named."""
    if len(sys.argv) != 2 or not (path := Path(sys.argv[1])).is_file():
        sys.exit(f"name one example, such as python examples/run.py {HERE.name}/flux_4k.py")
    path = path.resolve()
    if os.environ.get(SWITCH) == "tiny":
        with folder(), tiny():
            runpy.run_path(str(path), run_name="__main__")
    else:
        runpy.run_path(str(path), run_name="__main__")


if __name__ == "__main__":
    main()
