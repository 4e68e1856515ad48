"""Plugin of SGLang's diffusion server: methods on the pipelines of its diffusers backend.

Followed in SGLang 0.5.23: ``DiffusersPipeline._load_diffusers_pipeline`` returns the placed, maybe compiled diffusers
pipeline, and ``DiffusersExecutionStage.forward(batch, server_args)`` calls it once and swallows its warnings, which is
why our log line repeats the report's notes.
"""

from collections.abc import Callable
from typing import Any

from .settings import requested

HOOKS = "sglang.multimodal_gen.runtime.platforms.plugins"
"""The module that takes hooks: ``HookRegistry.register(target, hook, HookType)``."""

PIPELINE = "sglang.multimodal_gen.runtime.pipelines.diffusers_pipeline"
LOADED = f"{PIPELINE}.DiffusersPipeline._load_diffusers_pipeline"
REQUEST = f"{PIPELINE}.DiffusersExecutionStage.forward"


def register() -> None:
    """Hook the diffusers backend where ``DIT_ACCEL`` is set; entry point of ``sglang.multimodal_gen.plugins``.

    SGLang calls it once in every process, imports the targets later, and logs an error as that of this plugin.
    """
    if not requested():
        return
    from importlib import import_module

    hooks = import_module(HOOKS)
    hooks.HookRegistry.register(LOADED, attach_loaded, hooks.HookType.AFTER)
    hooks.HookRegistry.register(REQUEST, run_request, hooks.HookType.AROUND)


def attach_loaded(pipe: Any, *_: Any, **__: Any) -> None:
    """Attach to a loaded pipeline; behind ``_load_diffusers_pipeline(self, model_path, server_args)``."""
    from .requests import attach_requested

    attach_requested(pipe)


def run_request(forward: Callable[..., Any], stage: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a request by `answer`; around ``forward(self, batch, server_args)`` of the stage that calls the pipeline."""
    from .requests import answer, generators_of

    drawn = generators_of(getattr(batch, "generator", None))
    pipe = getattr(stage, "diffusers_pipe", None)
    return answer(pipe, lambda: forward(stage, batch, *args, **kwargs), drawn)
