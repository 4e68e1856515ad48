"""LoRAs made for few steps: the options by which their makers run them, proposed and never set."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dit_accel.adapters import Family
from dit_accel.adapters.model_files import ModelFiles
from dit_accel.methods.few_steps import MOST, SCHEDULERS

from .lora import Lora, lora_file
from .options import RunOptions
from .pipeline_call import CallSignature


@dataclass(frozen=True, slots=True)
class FewSteps:
    """How the makers of a kind of few-step LoRA run it."""

    sign: str  # pattern in the file's name or title
    source: str  # where that is said
    steps: int  # where the name says none
    guidance: float | None = 1.0  # guidance scale; None: the pipeline's own
    shift: float | None = None  # noise shift; None: the model's own


KINDS = (
    FewSteps("qwen.*lightning", "lightx2v/Qwen-Image-Lightning", 8, shift=3.0),
    FewSteps("lightx2v|lightning", "lightx2v/Wan2.2-Lightning", 4, shift=5.0),
    FewSteps("causvid", "arXiv 2412.07772", 4),
    FewSteps("self_?forcing|dmd", "arXiv 2506.08009 and 2405.14867", 4),
    FewSteps("lcm", "arXiv 2311.05556", 4),
    FewSteps("hyper", "ByteDance/Hyper-SD", 8, guidance=None),
    FewSteps("turbo", "alimama-creative/FLUX.1-Turbo-Alpha", 8, guidance=None),
)
"""Kinds of LoRA that are made for few steps; the first whose sign is there counts."""

OTHERS = FewSteps("", "", 4)
"""What is proposed for a LoRA whose name says its steps and no kind."""

STEPS = re.compile(r"(?<!\d)(\d{1,2})[-_ ]?steps?", re.IGNORECASE)

TITLES = ("modelspec.title", "ss_output_name", "title", "name")
"""Where a file's metadata says what it is called."""


def proposals(request: RunOptions, call: CallSignature) -> Iterator[str]:
    """Give, for each LoRA that seems made for few steps, the options of its makers that a request does not have."""
    for lora in map(Lora.of, request.lora):
        kind, steps = _kind(lora)
        if kind is None:
            continue
        guidance = "true_cfg_scale" if call.takes("true_cfg_scale") else "guidance_scale"
        wanted = {
            "--num-inference-steps": ("num_inference_steps", int(steps[1]) if steps else kind.steps),
            f"--{guidance.replace('_', '-')}": (guidance, kind.guidance),
            "--shift": ("flow_shift", kind.shift),
        }
        missing = [
            f"{flag} {value:g}"
            for flag, (name, value) in wanted.items()
            if value is not None and value not in (getattr(request, name), call.default(name))
        ]
        if missing:
            by = f", as {kind.source} runs its kind" if kind.source else ""
            yield f"the LoRA {lora.name} seems made for few steps, by its name; try {' '.join(missing)}{by}"


def few_steps_of(request: RunOptions, family: Family, files: ModelFiles) -> str:
    """Return what tells, before weights are loaded, that a model is made for few steps; empty: nothing does."""
    loras = [f"the LoRA {lora.name}" for lora in map(Lora.of, request.lora) if _kind(lora)[0] is not None]
    kinds = [str(files.index[name][1]) for name in ("scheduler",) if files.has(name)]
    usual = [family.name] if family.num_inference_steps <= MOST else []
    return next(iter([*loras, *filter(SCHEDULERS.match, kinds), *usual]), "")


def _kind(lora: Lora) -> tuple[FewSteps | None, re.Match[str] | None]:
    """Return the kind of few-step LoRA that one seems to be, and the steps that its name says."""
    words = _words(lora.name)
    steps = STEPS.search(words)
    kind = next((kind for kind in KINDS if re.search(kind.sign, words, re.IGNORECASE)), OTHERS if steps else None)
    return kind, steps


def _words(name: str) -> str:
    """Return the name of a LoRA and of its file's folder, with the titles in the file's metadata."""
    words, file = "/".join(Path(name).parts[-2:]), lora_file(name)
    if file is None:
        return words
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
    return " ".join([words, *(metadata[key] for key in TITLES if key in metadata)])
