"""Plugin of vllm-omni: methods on the pipelines of its diffusers backend, which takes no cache of its own.

Followed in vllm-omni 0.30.0: ``DiffusersAdapterPipeline.load_weights()`` leaves the loaded and placed diffusers
pipeline in ``_pipeline``, and ``forward(req)`` calls it once, under `torch.inference_mode`.
"""

import functools
import logging
from typing import Any

from .settings import VARIABLE, requested

ADAPTER = "vllm_omni.diffusion.models.diffusers_adapter.pipeline_diffusers_adapter"
"""The module of the class whose methods are wrapped."""

LOGGER = logging.getLogger("vllm_omni.dit_accel")  # vllm-omni shows what stands below its own name


def register() -> None:
    """Wrap the diffusers backend where ``DIT_ACCEL`` is set; entry point of ``vllm_omni.general_plugins``.

    vllm-omni calls it in every process, maybe more than once, and would end on an error: there is none.
    """
    if not requested():
        return
    try:
        from importlib import import_module

        wrap_adapter(import_module(ADAPTER).DiffusersAdapterPipeline)
    except Exception as error:
        LOGGER.warning("dit-accel: %s is set, but the diffusers backend was not found: %s", VARIABLE, error)


def wrap_adapter(adapter: Any) -> None:
    """Let a class attach when it has loaded its pipeline, and run each request by `answer`; once, however often called.

    ``adapter``: a class with ``load_weights(self)``, ``forward(self, req)`` and the pipeline in ``_pipeline``.
    """
    load, forward = adapter.load_weights, adapter.forward
    if hasattr(load, "dit_accel"):
        return

    @functools.wraps(load)
    def load_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        from .requests import attach_requested

        loaded = load(self, *args, **kwargs)
        attach_requested(getattr(self, "_pipeline", None), logger=LOGGER)
        return loaded

    @functools.wraps(forward)
    def run(self: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
        from .requests import answer, generators_of

        drawn = generators_of(getattr(getattr(req, "sampling_params", None), "generator", None))
        return answer(
            getattr(self, "_pipeline", None), lambda: forward(self, req, *args, **kwargs), drawn, logger=LOGGER
        )

    load_weights.dit_accel = True  # type: ignore[attr-defined]
    adapter.load_weights, adapter.forward = load_weights, run
