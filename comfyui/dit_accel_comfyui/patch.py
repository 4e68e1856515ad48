"""What our nodes put on a model of ComfyUI's: the methods asked for, and the wrappers that let them act as it samples.

Everything a run needs lives in that run's own copy of the model's options, so that neither a clone of the model nor the
next run sees it. The attention slot is held only while a forward is inside, in front of whatever held it: the order of
the nodes does not matter.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dit_accel.errors import ConfigError
from dit_accel.methods.config import MethodConfig
from dit_accel.methods.registry import method
from dit_accel.methods.toml import from_toml

from .compiled import outside
from .placing import inputs_of
from .report import RunReport, report_of
from .run import Run

KEY = "dit_accel"
RUN_KEY = "dit_accel_run"
LOG = logging.getLogger("dit_accel_comfyui")


@dataclass(slots=True)
class LastRun:
    """Where the report of a patch's last run lies; clones of a model share it."""

    report: RunReport | None = None


@dataclass(frozen=True, slots=True)
class ModelPatch:
    """What the nodes of one model asked for.

    Attributes:
        configs: the methods.
        refused: one line for each node whose settings were refused.
        backend: the kernel backend's name.
        last: the last run's report.
    """

    configs: tuple[MethodConfig, ...] = ()
    refused: tuple[str, ...] = ()
    backend: str = "auto"
    last: LastRun = field(default_factory=LastRun)


def patch_of(model: Any) -> ModelPatch:
    """Return what was asked for on a model; an empty one where nothing was."""
    return model.model_options["transformer_options"].get(KEY) or ModelPatch()


def with_method(model: Any, name: str, options: str, backend: str | None = None, **settings: Any) -> Any:
    """Return a clone of a model with one method more; settings that are refused leave it as it was, with a line why.

    Args:
        model: ComfyUI's model patcher; it is not changed.
        name: the method's.
        options: further options of it, as lines of TOML.
        backend: the kernel backend; None: as it was.
        settings: options of the node; None leaves one to the method, ``options`` goes before them.
    """
    patch = replace(patch_of(model), last=LastRun())
    try:
        config = method_config(name, options, settings)
        patch = replace(patch, configs=(*patch.configs, config))
    except ConfigError as error:
        line = " ".join(str(error).split())
        LOG.warning("dit-accel: %s; %s is left out", line, name)
        patch = replace(patch, refused=(*patch.refused, line))
    if backend is not None:
        patch = replace(patch, backend=backend)
    model = model.clone()
    model.model_options["transformer_options"][KEY] = patch
    for kind, wrapper in (("outer_sample", around_sampling), ("diffusion_model", around_forward)):
        model.remove_wrappers_with_key(kind, KEY)
        model.add_wrapper_with_key(kind, KEY, wrapper)
    return model


def method_config(name: str, options: str, settings: dict[str, Any]) -> MethodConfig:
    """Return a method's config; `ConfigError` for an unknown method or option, or a value out of range."""
    config, *extras = from_toml(f"[{method(name).name}]\n{options}\n", f"the options of {name}")
    if extras:
        tables = ", ".join(f"[{extra.name}]" for extra in extras)
        raise ConfigError(f"the options of {name} hold tables of their own, {tables}; give lines such as a = 1 alone")
    chosen = {key: value for key, value in settings.items() if value is not None and key not in config.to_dict()}
    return type(config)(**{**chosen, **config.to_dict()})


def around_sampling(executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Begin a run of the methods for one sampling, and keep its report; ComfyUI's OUTER_SAMPLE wrapper."""
    guider: Any = executor.class_obj  # type: ignore[attr-defined]
    before = guider.model_options
    patch: ModelPatch | None = before["transformer_options"].get(KEY)
    if patch is None:
        return executor(*args, **kwargs)
    run = Run(patch.configs, patch.backend)
    run.problems.extend(patch.refused)
    guider.model_options = {**before, "transformer_options": {**before["transformer_options"], RUN_KEY: run}}
    try:
        return executor(*args, **kwargs)
    finally:
        guider.model_options = before
        run.end()
        patch.last.report = report_of(run)
        LOG.info("%s", patch.last.report.summary)


@torch.compiler.disable(recursive=False)
def around_forward(executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Let the run's methods act on one forward; ComfyUI's DIFFUSION_MODEL wrapper."""
    return outside(_forward, executor, args, kwargs)


def _forward(
    executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any], resumed: Callable[[], AbstractContextManager[None]]
) -> Any:
    def run_model() -> Any:
        with resumed():
            return executor(*args, **kwargs)

    inputs = inputs_of(executor.original, args, kwargs)
    options = inputs.get("transformer_options")
    run: Run | None = options.get(RUN_KEY) if isinstance(options, dict) else None
    if run is None or not run.configs:
        return run_model()
    return run.forward(executor.class_obj, run_model, inputs, options)
