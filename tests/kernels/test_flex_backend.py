"""The flex backend: what it refuses and says, and its result where it runs."""

import pytest
import torch
from dit_accel_kernels import BackendUnavailableError, FrameDecay, TileLists, block_sparse_attention, flex_backend
from kernel_cases import assert_within_rounding, qkv, random_lists

FRAMES = torch.zeros(40, dtype=torch.int32)
LISTS = random_lists(1, 40, 40, 16, 16, pooled=False)


@pytest.mark.parametrize(
    ("tiles", "arguments", "text"),
    [
        (random_lists(1, 40, 40, 16, 16), {}, "backend 'flex' has no pooled tiles: use 'torch' or 'auto'"),
        (LISTS, dict(key_length=torch.tensor([9])), "backend 'flex' has no a key mask"),
        (LISTS, dict(return_lse=True), "backend 'flex' has no LSE on a CPU"),
        (
            LISTS,
            dict(frame_decay=FrameDecay(table=torch.ones(1), q_frames=FRAMES, k_frames=FRAMES)),
            "backend 'flex' has no frame decay",
        ),
        (
            random_lists(1, 40, 40, 8, 24, pooled=False),
            {},
            "has no block_q 8 and block_k 24, which are not powers of 2",
        ),
    ],
)
def test_refuses_what_it_does_not_execute(tiles, arguments, text):
    q, k, v = qkv(1, 2, 2, 40, 40, 8, torch.float32)
    with pytest.raises(BackendUnavailableError, match=text):
        block_sparse_attention(q, k, v, tiles, layout="bhsd", backend="flex", **arguments)


def test_refuses_float64():
    q, k, v = qkv(1, 2, 2, 40, 40, 8, torch.float64)
    with pytest.raises(BackendUnavailableError, match="backend 'flex' has no float64"):
        block_sparse_attention(q, k, v, LISTS, layout="bhsd", backend="flex")


def test_says_what_the_machine_lacks(monkeypatch):
    q, k, v = qkv(1, 2, 2, 40, 40, 8, torch.float32)
    monkeypatch.setattr(flex_backend.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    with pytest.raises(BackendUnavailableError, match=r"'flex' compiles its kernel and needs a C\+\+ compiler"):
        block_sparse_attention(q, k, v, LISTS, layout="bhsd", backend="flex")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(BackendUnavailableError, match=r"needs a CPU with AVX2 \(found DEFAULT\)"):
        block_sparse_attention(q, k, v, LISTS, layout="bhsd", backend="flex")
    monkeypatch.setattr(flex_backend.importlib.util, "find_spec", lambda name: None)
    assert flex_backend.missing_requirement("cuda") == "the triton package"


@pytest.mark.slow
@pytest.mark.skipif(flex_backend.missing_requirement("cpu") is not None, reason="FlexAttention cannot compile here")
def test_agrees_with_the_specification():
    """One shape, since each compiles for seconds: per-head lists, grouped heads, head scale, ragged tail, empty row."""
    q, k, v = qkv(1, 4, 2, 300, 300, 64, torch.float32)
    tiles, scale = random_lists(4, 300, 300, 64, 64, pooled=False), torch.tensor([0.5, 1.0, 1.5, 2.0])
    found, yardstick, truth = (
        block_sparse_attention(*inputs, tiles, layout="bhsd", head_scale=scale, backend=backend)
        for inputs, backend in (
            ((q, k, v), "flex"),
            ((q, k, v), "reference"),
            ((q.double(), k.double(), v.double()), "reference"),
        )
    )
    assert isinstance(tiles, TileLists)
    assert_within_rounding(found, yardstick, truth, torch.float32)
