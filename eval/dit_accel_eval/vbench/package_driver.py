"""Runs one dimension of the official vbench package, by the Python of an environment that has it (`official`).

It imports nothing of this project. Its JSON file has ``videos``, ``output``, ``name``, ``dimension``, ``custom``,
``prompts``, ``full_info``, ``device``, ``local``, and ``filter_to``, a folder: videos pass the static filter first.
"""
# pyright: reportMissingImports=false

import json
import os
import sys
from importlib import import_module
from types import SimpleNamespace
from typing import Any


def main(path: str) -> None:
    """Filter the videos where that is requested, and measure; the package writes its own result files."""
    import torch

    package: Any = import_module("vbench")  # by name: a type checker takes this file's own folder for it

    with open(path, encoding="utf-8") as file:
        request = SimpleNamespace(**json.load(file))
    videos = request.videos
    if request.filter_to:
        from vbench.cli import static_filter as filtering
        from vbench.utils import init_submodules

        filtering.DEVICE = request.device
        model = os.path.join(filtering.CACHE_DIR, "raft_model", "models", "raft-things.pth")
        init_submodules(["dynamic_degree"], local=request.local)  # fetches RAFT where it is missing
        filtering.static_filter(SimpleNamespace(
            model=model, videos_path=videos, result_path=request.filter_to, store_name="filtered.json", small=False,
            mixed_precision=False, alternate_corr=False, filter_scope="temporal_flickering",
        ))  # fmt: skip
        videos = os.path.join(request.filter_to, "filtered_videos")
    package.VBench(torch.device(request.device), request.full_info, request.output).evaluate(
        videos_path=videos, name=request.name, prompt_list=request.prompts, dimension_list=[request.dimension],
        local=request.local, read_frame=False, mode="custom_input" if request.custom else "vbench_standard",
        imaging_quality_preprocessing_mode="longer",
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
