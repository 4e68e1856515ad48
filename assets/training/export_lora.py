"""Packs a LoRA of few steps and measures it against its gate: `python assets/training/export_lora.py RUN`.

It becomes a model of its own beside the one that it was distilled from, such as wan-tiny-4: a folder with the LoRA in
float16, as diffusers names it, the scheduler, and configs; the weights are the other model's. The gate: the judge's
score is at most 5 points below that of the other model's 20 guided steps, on the same prompts and seeds.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import accept
import subjects
import torch
from common import last_checkpoint
from diffusers import FlowMatchEulerDiscreteScheduler
from dit_accel_assets import load, model_defaults
from dit_accel_assets.catalog import MODELS
from export import LOGS
from safetensors.torch import save_file

LOST = 0.05
"""By how much the judge's score may be below that of the model's usual steps."""


def pack(run: Path) -> tuple[str, int]:
    """Write the folder of a run's averaged LoRA and keep its log; return the model's name and the training's step."""
    state = last_checkpoint(run)
    recipe, weights = state["recipe"], state["averages"]["transformer"]
    base, steps = MODELS / recipe["model"], recipe["student_steps"]
    out = MODELS / f"{recipe['model']}-{steps}"
    parts = ("transformer", "vae", "scheduler", "text_encoder*")
    for file in [base / "model_index.json", *(path for part in parts for path in base.glob(f"{part}/*config.json"))]:
        place = out / file.relative_to(base)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    notes = {"model": recipe["model"], "num_inference_steps": steps, "guidance_scale": 1.0, "solver": "euler"}
    if "flux" not in recipe["model"]:  # whose pipeline works its shift out itself
        notes["flow_shift"] = recipe["flow_shift"]
        FlowMatchEulerDiscreteScheduler(shift=recipe["flow_shift"]).save_pretrained(out / "scheduler")
        index = json.loads((out / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", FlowMatchEulerDiscreteScheduler.__name__]
        (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    tensors = {
        f"transformer.{name.replace('.default.', '.')}": weight.half().contiguous()
        for name, weight in weights.items()
        if ".lora_" in name
    }
    metadata = {"format": "pt", "few_steps": json.dumps(notes)}
    save_file(tensors, out / "pytorch_lora_weights.safetensors", metadata=metadata)
    shutil.copy(run / "log.jsonl", LOGS / f"{out.name}.lora.log.jsonl")
    return out.name, state["step"]


def lora_gate(subject: subjects.Subject, name: str, base: str, count: int) -> dict[str, Any]:
    """Return the judge's scores of a model of few steps, of its base in as many, and of its base as it is meant."""
    scenes, figures = subject.scenes(count, subject.size), dict[str, Any]()
    few, usual = (int(model_defaults(model)["num_inference_steps"]) for model in (name, base))
    for key, model, steps in (("lora", name, few), ("without", base, few), ("usual", base, usual)):
        pipe, guidance = load(model), 1.0 if model == name else subject.guidance
        pipe.set_progress_bar_config(disable=True)
        figures[key] = accept.judged(subject, pipe, scenes, subject.frames, steps, guidance)
    lost = figures["usual"]["score"] - figures["lora"]["score"]
    return figures | {"lost": round(lost, 3), "at_most": LOST, "passed": bool(lost <= LOST)}


def main() -> None:
    """Pack a run's LoRA, judge it and write the figures beside its log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a training by distill.py, finished or not")
    parser.add_argument("--count", type=int, default=32, help="prompts that are judged (default %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    name, step = pack(args.run)
    base = name.rpartition("-")[0]
    subject = subjects.Image() if "flux" in base else subjects.Video()
    figures = {"model": name, "step": step, "judge": lora_gate(subject, name, base, args.count)}
    (LOGS / f"{name}.acceptance.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
