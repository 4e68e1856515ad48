"""How long the way of one planned attention call is, from the processor to the kernels: our own calls and files."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from wan_tiny import RADIAL, tiny_transformer

import dit_accel
from dit_accel.methods.config import MethodConfig

CORE = str(Path(dit_accel.__file__).parent)
KERNELS_ENTRY = "block_sparse_attention_eager"


def forward_of(transformer: Any, seed: int = 0) -> None:
    """Run one forward of a step that is told, over 5 x 4 x 4 tokens."""
    torch.manual_seed(seed)
    x, text = torch.randn(1, 12, 5, 8, 8), torch.randn(1, 6, 64)
    with torch.no_grad(), transformer.cache_context("cond", step_index=1, num_inference_steps=4):
        transformer(x, torch.tensor([900.0]), text, return_dict=False)


def traced_call(*methods: MethodConfig) -> tuple[Counter[str], Counter[str]]:
    """Return "file:function" -> calls of the core in one planned call: until the kernels' entry, and in all of it.

    Comprehensions and generators are not counted; they are calls in some versions of Python only.
    """
    transformer = tiny_transformer()
    until, whole = Counter[str](), Counter[str]()
    depth, entered = 0, False

    def trace(frame: Any, event: str, argument: Any) -> None:
        nonlocal depth, entered
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        begins = path.endswith("attachment/processor.py") and name == "__call__"
        if event == "call":
            depth += begins
            entered |= name == KERNELS_ENTRY
            if depth and path.startswith(CORE) and not name.startswith("<") and not inside_kernels(frame):
                where = f"{path.removeprefix(CORE)[1:]}:{name}"
                whole[where] += 1
                if not entered:
                    until[where] += 1
        elif event == "return" and begins:
            depth -= 1
            sys.setprofile(None)  # the first layer's call alone

    with dit_accel.attach(transformer, *(methods or (RADIAL,)), preset="none", backend="torch") as attachment:
        for seed in (0, 1, 2):  # of the fourth forward, as of most, the clock times no parts
            forward_of(transformer, seed)
        layer = attachment.engine.layers[1].module
        hooks = [layer.register_forward_pre_hook(lambda *_: sys.setprofile(trace))]
        try:
            forward_of(transformer, 1)
        finally:
            sys.setprofile(None)
            hooks[0].remove()
    return until, whole


def inside_kernels(frame: Any) -> bool:
    """Tell whether the kernels call: what they call back is theirs."""
    while frame is not None:
        if frame.f_code.co_name == KERNELS_ENTRY:
            return True
        frame = frame.f_back
    return False
