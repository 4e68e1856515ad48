"""No call waits for the device once its plan is made: refused on a CPU, and captured into a CUDA graph on a GPU."""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product

import pytest
import torch
from dit_accel_kernels import EXACT, FrameDecay, Routing, Selection, TileLists, Vote
from dit_accel_kernels import block_sparse_attention_backward, block_sparse_attention_eager, cache, checks, pack_bits
from dit_accel_kernels.backends.triton.support import interpreted
from kernel_cases import frame_decay, lists_of, qkv
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # log of a pooled tile without a key
TOKENS, BLOCK, COUNT = 43, 16, 3  # the last tile is ragged
READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__"}
WAITING = (
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_static", "masked_select", "_unique2",
    "unique_dim", "unique_consecutive", "allclose",
)  # fmt: skip


class HostSyncError(Exception):
    """An operation that waits for the device."""


class _NoReads(TorchFunctionMode):
    """Refuses the methods that read a tensor's values."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READS:
            raise HostSyncError(func.__name__)
        return func(*args, **(kwargs or {}))


class _NoSyncs(TorchDispatchMode):
    """Refuses the operations whose result's shape or value the host must know."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        kwargs = kwargs or {}
        places = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in places)
        counted = name == "repeat_interleave" and kwargs.get("output_size") is None and isinstance(args[-1], Tensor)
        if name in WAITING or by_mask or counted:
            raise HostSyncError(str(func))
        return func(*args, **kwargs)


@contextmanager
def no_syncs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refuse every wait for the device, but in the interpreter, which stands in for the device."""
    launch = interpreter.GridExecutor.__call__

    def device(self, *args, **kwargs):
        with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
            return launch(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", device)
        with _NoReads(), _NoSyncs():
            yield


@pytest.fixture(autouse=True)
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU calls read their lists' values, which is free there; these stand for calls on a GPU."""
    for module in (cache, checks):
        monkeypatch.setattr(module, "readable", lambda device: False)


def lists(rest: int, feature: str, device: str = "cpu") -> TileLists:
    """Diagonal and first column exact, everything else `rest`, in tiles of BLOCK; with masks inside for one feature."""
    states = torch.full((COUNT, COUNT), rest, dtype=torch.uint8).fill_diagonal_(EXACT)
    states[:, 0] = EXACT
    tiles = lists_of(states, BLOCK, BLOCK, TOKENS, TOKENS)
    if "inside" in feature:
        causal = pack_bits(torch.ones(1, BLOCK, BLOCK, dtype=torch.bool).tril())
        tiles = replace(tiles, mask_ids=torch.arange(tiles.tiles_exact, dtype=torch.int32) % 2 - 1, mask_bits=causal)
    return tiles.to(device)


def decay(device: str) -> FrameDecay:
    with torch.device(device):
        return frame_decay(TOKENS, frame=10)


def pinned(device: str) -> Tensor:
    """The diagonal, as bits."""
    return pack_bits(torch.eye(COUNT, dtype=torch.bool)).to(device)


def kept(device: str) -> Tensor:
    """Two tiles a row, as bits of one batch and two heads."""
    tile = torch.arange(COUNT)
    return pack_bits((tile[:, None] + tile) % COUNT < 2).expand(1, 2, -1, -1).to(device)


FEATURES: dict[str, Callable[[str], dict]] = {
    "plain": lambda device: {},
    "decay": lambda device: {"frame_decay": decay(device)},
    "key mask": lambda device: {
        "key_mask": (torch.arange(TOKENS) % 7 > 0)[None].to(device), "key_length": torch.tensor([30], device=device),
    },
    "masks inside tiles": lambda device: FEATURES["key mask"](device),
    "token order": lambda device: {"token_order": torch.arange(TOKENS).flip(0).to(device)},
    "routing": lambda device: {"selection": Selection(routing=Routing(beta=0.0), pinned=pinned(device))},
    "kept tiles": lambda device: {"selection": Selection(keep=kept(device), rest="pooled", pinned=pinned(device))},
    "votes": lambda device: {"selection": Selection(keep=kept(device), vote=Vote(threshold=-1.0), reverse=True)},
    "routing among kept tiles": lambda device: {
        "selection": Selection(keep=kept(device), routing=Routing(beta=0.0), pinned=pinned(device)),
    },
    "everything": lambda device: {
        **FEATURES["decay"](device), **FEATURES["key mask"](device), **FEATURES["token order"](device),
        "head_scale": torch.tensor([0.5, 1.5], device=device),
        "identity_mix": torch.tensor([0.0, 0.5], device=device),
        "identity_rows": (torch.arange(TOKENS) > 9).to(device),
    },
    "int8": lambda device: {**FEATURES["key mask"](device), **FEATURES["token order"](device), "precision": "int8"},
}  # fmt: skip


def tensors(device: str = "cpu") -> list[Tensor]:
    """q, k, v and a gradient of the output, [B, H, S, D]."""
    q, k, v = qkv(1, 2, 1, TOKENS, TOKENS, 16, torch.float32)
    return [x.to(device) for x in (q, k, v, torch.randn_like(q))]


def forward(inputs: list[Tensor], tiles: TileLists, features: dict) -> tuple[Tensor, ...]:
    q, k, v, _ = inputs
    found = block_sparse_attention_eager(q, k, v, tiles, layout="bhsd", backend="triton", return_lse=True, **features)
    return tuple(found)


def backward(inputs: list[Tensor], tiles: TileLists, features: dict) -> tuple[Tensor, ...]:
    q, k, v, grad = inputs
    return block_sparse_attention_backward(grad, q, k, v, tiles, layout="bhsd", backend="triton", **features)


CALLS = [(f, call) for f in FEATURES for call in (forward, backward) if (f, call) != ("int8", backward)]


def test_every_kind_of_wait_is_refused(monkeypatch):
    x = torch.ones(4)
    for wait in (
        lambda x: x.max().item(), lambda x: x.tolist(), lambda x: bool(x.any()), lambda x: int(x.sum()),
        lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.cpu(), lambda x: torch.equal(x, x),
        lambda x: torch.repeat_interleave(x, x.long()),
    ):  # fmt: skip
        with no_syncs(monkeypatch), pytest.raises(HostSyncError):
            wait(x)
        wait(x)


@pytest.mark.sample(12)
@pytest.mark.parametrize("rest", [0, 1], ids=["skipped", "pooled"])
@pytest.mark.parametrize(("feature", "call"), CALLS)
def test_planned_calls_never_wait(feature, call, rest, monkeypatch):
    tiles, features, inputs = lists(rest, feature), FEATURES[feature]("cpu"), tensors()
    call(inputs, tiles, features)
    others = [x.flip(2) for x in inputs]
    expected = call(others, tiles, features)
    with no_syncs(monkeypatch):
        found = call(others, tiles, features)
    assert all(map(torch.equal, found, expected))


@pytest.mark.sample
@pytest.mark.parametrize("rest", [0, 1], ids=["skipped", "pooled"])
@pytest.mark.parametrize(("feature", "call"), [x for x in CALLS if x[0] not in ("decay", "everything")])
def test_plans_are_made_without_a_wait(feature, call, rest, monkeypatch):
    """All but those with decay, which read the number of frames once."""
    tiles, features, inputs = lists(rest, feature), FEATURES[feature]("cpu"), tensors()
    with no_syncs(monkeypatch):
        call(inputs, tiles, features)


@pytest.mark.gpu
@pytest.mark.skipif(interpreted(), reason="interprets its kernels: TRITON_INTERPRET=0 runs them on a GPU")
@pytest.mark.parametrize("feature", FEATURES)
def test_calls_replay_from_a_cuda_graph(feature):
    for call, rest in product([call for name, call in CALLS if name == feature], (0, 1)):
        check_replay(feature, call, rest)


def check_replay(feature: str, call: Callable, rest: int) -> None:
    """Captured on one set of inputs, replayed on another: bit for bit what the call gives there."""
    tiles, features, inputs = lists(rest, feature, "cuda"), FEATURES[feature]("cuda"), tensors("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(inputs, tiles, features)  # makes the plan and compiles the kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(inputs, tiles, features)
    for x, other in zip(inputs, tensors("cuda"), strict=True):
        x.copy_(other)
    graph.replay()
    assert all(map(torch.equal, found, call(inputs, tiles, features)))
