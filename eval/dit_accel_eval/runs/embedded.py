"""The embedded models as the suites run them, by their names."""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from dit_accel_assets import held_out_prompts, model_defaults, model_names, model_path
from dit_accel_pipelines.generation.pipeline_call import PipelineCall, pipeline_class
from dit_accel_pipelines.generation.quiet import quiet_diffusers
from dit_accel_pipelines.generation.request import check_words

from dit_accel import ConfigError
from dit_accel.adapters.model_files import read_model_files
from dit_accel.errors import did_you_mean

from .conditions import HeldOutClips, OwnClips
from .model import SuiteModel

FIRST_PROMPT = 64
"""Number of the first held-out prompt that tuning may look at; the suites evaluate those below it."""


class EmbeddedModel(SuiteModel):
    """A loaded embedded model.

    Args:
        call: arguments of the pipeline's call besides the model's defaults, such as ``num_frames``.
        prompt: of all clips, whose number is then only the seed; None: each number's held-out prompt.
        own: prompts and seeds instead; None: held-out ones.

    Raises:
        ConfigError: for an unknown model, arguments that its pipeline does not take, or words that it never saw.
    """

    def __init__(
        self, name: str, call: Mapping[str, Any], prompt: str | None = None, own: OwnClips | None = None
    ) -> None:
        from diffusers import DiffusionPipeline

        check_name(name)
        for text in (*([] if prompt is None else [prompt]), *(own.prompts if own else ())):
            check_words(text, name)
        with quiet_diffusers():
            pipe: Any = DiffusionPipeline.from_pretrained(model_path(name), dtype=torch.float32)
        adapter, family = read_model_files(str(model_path(name))).identify()
        settled = settled_call(name, call)
        super().__init__(
            pipe, name=name, weights=weights_hash(name), call=settled, adapter=adapter, family=family,
            clips=own or HeldOutClips(model=name, only=prompt),
        )  # fmt: skip


def check_name(name: str) -> None:
    """Refuse a model that is not embedded, with the nearest that is."""
    if name not in model_names():
        raise ConfigError(f"{name!r} is no embedded model; {did_you_mean(name, model_names())}")


@functools.cache
def weights_hash(name: str) -> str:
    """Return 12 hexadecimal digits that tell a model's weights from others', by all its safetensors files."""
    folder, found = model_path(name), hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        found.update(path.relative_to(folder).as_posix().encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def settled_call(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a model's call: its defaults, without steps, changed by what was given.

    Raises:
        ConfigError: for an argument that its pipeline does not take.
    """
    call = PipelineCall.of(pipeline_class(read_model_files(str(model_path(name)))))
    known = [key for key in call.parameters if key not in ("self", "prompt", "num_inference_steps", "generator")]
    for key in given:
        if key not in known:
            raise ConfigError(f"a suite's call of {name} takes no {key!r}; {did_you_mean(key, known)}")
    defaults = {key: value for key, value in model_defaults(name).items() if key in known}
    return {**defaults, **given}


def embedded_prompts(name: str, count: int = 2) -> tuple[str, ...]:
    """Return prompts that an embedded model knows, none of those that the suites evaluate."""
    return tuple(held_out_prompts(name, FIRST_PROMPT + count)[FIRST_PROMPT:])
