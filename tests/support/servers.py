"""The servers whose plugins ours are: their own code where it is installed or unpacked on the path, else stand-ins.

Of their own code the named modules run as they are; everything that these import of their packages is made up, so that
neither their engines nor a GPU is needed.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from tiny_parts import texts
from wan_tiny import sharp_transformer

from dit_accel.serving import sglang, vllm_omni

HERE = Path(__file__).parent
STAND_INS: Mapping[str, Mapping[str, Path]] = {
    "vllm_omni": {vllm_omni.ADAPTER: HERE / "stand_in_vllm_omni.py"},
    "sglang": {sglang.PIPELINE: HERE / "stand_in_sglang.py", sglang.HOOKS: HERE / "stand_in_sglang_plugins.py"},
}
ALSO_THEIRS = {"vllm_omni": (), "sglang": ("sglang.srt.plugins.hook_registry",)}
"""Modules without stand-ins that run as they are beside those."""


def their_files(server: str) -> dict[str, Path] | None:
    """Return module -> file of a server's own code; None where it is not on the path."""
    found = importlib.util.find_spec(server)
    if found is None or not found.submodule_search_locations:
        return None
    root = Path(next(iter(found.submodule_search_locations))).parent
    names = (*STAND_INS[server], *ALSO_THEIRS[server])
    return {name: root.joinpath(*name.split(".")).with_suffix(".py") for name in names}


class _MadeUp(ModuleType):
    """A module in which every name is there: a class where it is spelled as one, else a mock."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (SimpleNamespace,), {}) if name[:1].isupper() and not name.isupper() else MagicMock(name=name)
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, packages: tuple[str, ...], files: Mapping[str, Path]) -> None:
        self.packages, self.files = packages, files

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in self.packages:
            return importlib.util.spec_from_loader(name, self, is_package=name not in self.files)
        return None

    def create_module(self, spec: Any) -> ModuleType | None:
        return None if spec.name in self.files else _MadeUp(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        if (path := self.files.get(module.__name__)) is not None:
            exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), module.__dict__)


@contextmanager
def importable(server: str, files: Mapping[str, Path]) -> Iterator[None]:
    """Let a server's modules be imported from files inside the block, and be gone behind it."""
    packages = (server, *(() if importlib.util.find_spec("torchvision") else ("torchvision",)))
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in packages}
    for name in before:
        del sys.modules[name]
    finder = _Finder(packages, files)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] in packages]:
            del sys.modules[name]
        sys.modules.update(before)


def prompted_wan() -> WanPipeline:
    """A tiny Wan pipeline that takes prompts: each text has embeddings of its own, with no text encoder."""
    none: Any = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    pipe: Any = WanPipeline(
        transformer=sharp_transformer(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **none
    )

    def encode_prompt(prompt: Any, negative_prompt: Any = None, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        several = [prompt] if isinstance(prompt, str) else prompt
        return texts(several, 6, 64), texts([negative_prompt or ""] * len(several), 6, 64)

    pipe.encode_prompt = encode_prompt
    pipe.set_progress_bar_config(disable=True)
    return pipe


class VllmOmni:
    """vllm-omni's diffusers backend around one pipeline."""

    plugin = vllm_omni

    def __init__(self, pipe: Any) -> None:
        adapter = importlib.import_module(vllm_omni.ADAPTER).DiffusersAdapterPipeline
        adapter._load_pipeline_from_pretrained = lambda self, model_id, load_kwargs: pipe
        attention = SimpleNamespace(default=SimpleNamespace(backend="TORCH_SDPA"))
        config = MagicMock(
            diffusion_offload_config=None, cache_backend="none", enforce_eager=False, quantization_config=None,
            dtype=torch.float32, diffusers_load_kwargs={}, diffusers_call_kwargs={}, enable_layerwise_offload=False,
            enable_cpu_offload=False, vae_use_slicing=False, vae_use_tiling=False, output_type="latent",
            diffusion_attention_config=attention, enable_diffusion_pipeline_profiler=False,
            parallel_config=SimpleNamespace(tensor_parallel_size=1, cfg_parallel_size=1, sequence_parallel_size=1),
        )  # fmt: skip
        made_up = {name: MagicMock() for name in ("setup_diffusion_pipeline_profiler",)}
        self.adapter = type("Loaded", (adapter,), made_up)(od_config=config, device=torch.device("cpu"))
        self.adapter.load_weights()

    def request(self, prompts: list[str], generator: Any, **call: Any) -> torch.Tensor:
        """Send one request, and return the latents."""
        sampling = SimpleNamespace(
            generator=generator, seed=None, output_type="latent", num_outputs_per_prompt=0, extra_args={}, **call
        )
        made = self.adapter(SimpleNamespace(prompts=[{"prompt": one} for one in prompts], sampling_params=sampling))
        return getattr(made, "output", made)


class SGLang:
    """SGLang's diffusers backend around one pipeline."""

    plugin = sglang

    def __init__(self, pipe: Any) -> None:
        importlib.import_module(sglang.HOOKS).HookRegistry.apply_hooks()
        module: Any = importlib.import_module(sglang.PIPELINE)
        module.DiffusionPipeline = SimpleNamespace(from_pretrained=lambda *_, **__: pipe)
        module.get_local_torch_device = lambda: torch.device("cpu")
        module.resolve_diffusers_pipeline_offload = lambda residency: False
        module.resolve_precision = lambda *_, **__: torch.float32
        settings = SimpleNamespace(
            vae_slicing=False, vae_tiling=False, quantization_config=None, diffusers_attention_backend=None
        )
        self.args = SimpleNamespace(
            pipeline_config=settings, attention_backend=None, cache_dit_config=None, enable_torch_compile=False,
            trust_remote_code=False, revision=None, component_residency=None,
        )  # fmt: skip
        loader = module.DiffusersPipeline.__new__(module.DiffusersPipeline)  # whose weights are not ours to load
        self.stage = module.DiffusersExecutionStage(loader._load_diffusers_pipeline("tiny", self.args))

    def request(self, prompts: list[str], generator: Any, **call: Any) -> torch.Tensor:
        """Send one request, and return what became of the latents."""
        known = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
        batch = SimpleNamespace(
            prompt=prompts[0] if len(prompts) == 1 else prompts, negative_prompt=None, true_cfg_scale=None,
            generator=generator, seed=None, generator_device="cpu", condition_image=None, pixel_values=None,
            image_path=None, num_outputs_per_prompt=1, output=None, **{name: call.pop(name, None) for name in known},
        )  # fmt: skip
        batch.extra = {"diffusers_kwargs": {"output_type": "latent", **call}}
        return self.stage.forward(batch, self.args).output


SERVERS: Mapping[str, Any] = {"vllm_omni": VllmOmni, "sglang": SGLang}
