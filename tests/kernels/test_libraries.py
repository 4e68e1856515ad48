"""Backends of other libraries, cuDNN's front end and FlashInfer, by stand-ins that read the lists alone."""

import importlib
import importlib.metadata
import inspect
from itertools import product

import library_stand_ins
import pytest
import torch
from dit_accel_kernels import (
    BackendUnavailableError,
    Routing,
    Selection,
    Vote,
    cudnn_requirement,
    flashinfer_requirement,
)
from dit_accel_kernels.backends import cudnn, flashinfer, library
from dit_accel_kernels.choice.candidates import CANDIDATES
from dit_accel_kernels.choice.self_check import Kind, fault
from kernel_cases import attend, check_against_reference, frame_decay, full, lists_of, qkv, random_lists, with_masks

CPU, HALF = torch.device("cpu"), torch.bfloat16
PACKAGES = {"cudnn": (cudnn, cudnn.FUNCTION), "flashinfer": (flashinfer, flashinfer.WRAPPER)}


@pytest.fixture(params=list(PACKAGES))
def name(request, monkeypatch, unwritten_is_nan):
    """Each of the backends, on a card of sm_90 with its library there."""
    library_stand_ins.install(monkeypatch)
    yield request.param
    library.missing_package.cache_clear()


def lists(groups: int, num_q: int, num_k: int, side: int):
    return random_lists(groups, num_q, num_k, side, side, pooled=False)


# case -> batch, heads, key heads, queries, keys, list sets, tile, layout; a row of tiles is empty in each
CASES = {
    "plain": (1, 1, 1, 384, 384, 1, 128, "bhsd"),
    "tokens first, ragged tails": (1, 2, 2, 300, 333, 1, 128, "bshd"),
    "lists by head, tiles of 64": (1, 2, 2, 200, 200, 2, 64, "bshd"),
    "shared keys": (1, 4, 2, 300, 300, 1, 128, "bhsd"),
    "shared keys, lists by head": (1, 4, 2, 300, 300, 4, 128, "bshd"),
    "batch": (2, 4, 2, 300, 300, 1, 128, "bhsd"),
    "batch, lists by head": (2, 2, 2, 300, 300, 2, 128, "bshd"),
    "batch, lists by batch and head": (2, 2, 1, 300, 300, 4, 128, "bhsd"),
}


@pytest.mark.parametrize(("case", "scaled"), list(product(CASES, (False, True))))
def test_outputs_and_lse_are_those_of_the_lists(name, case, scaled):
    batch, heads, key_heads, num_q, num_k, groups, side, layout = CASES[case]
    given = qkv(batch, heads, key_heads, num_q, num_k, 64, HALF, layout)
    more = dict(head_scale=torch.linspace(0.8, 1.2, heads)) if scaled else {}
    check_against_reference(*given, lists(groups, num_q, num_k, side), name, layout=layout, **more)


def test_what_is_no_tensor_of_its_own_is_read_right(name):
    whole = torch.randn(1, 300, 3, 2, 64).to(HALF)[:, 3:]  # q, k and v of one product, 3 rows into it
    q, k, v = whole.unbind(2)
    odd = torch.empty(q.numel() + 1, dtype=HALF)[1:].view(q.shape).copy_(q)  # whose rows begin at odd addresses
    for given in ((q, k, v), (odd, odd, odd)):
        check_against_reference(*given, lists(2, 297, 297, 128), name, layout="bshd")


@pytest.mark.parametrize("features", [(), ("LSE", "shared key heads"), ("scales of heads",)])
@pytest.mark.parametrize("side", [64, 128])
def test_the_self_check_takes_the_right_one_and_no_wrong_one(name, features, side, monkeypatch):
    kind = Kind(CPU, HALF, 64, 64, (side, side), frozenset(features))
    assert fault(kind, CANDIDATES[name].attend) is None
    monkeypatch.setattr(library_stand_ins, "broken", "lists")
    assert "does not follow its lists" in fault(kind, CANDIDATES[name].attend)
    monkeypatch.setattr(library_stand_ins, "broken", "base")
    assert bool(fault(kind, CANDIDATES[name].attend)) == ("LSE" in features)


def test_lists_are_made_once_and_a_selection_is_lists_of_its_own(name):
    given, tiles = qkv(1, 2, 2, 300, 300, 64, HALF), lists(2, 300, 300, 128)
    for _ in range(3):
        attend(*given, tiles, backend=name)
    calls = library_stand_ins.calls
    routed = dict(selection=Selection(routing=Routing(beta=-8.0), pinned=None), return_tiles=True)
    if name == "flashinfer":
        assert len(calls) == 1
        with pytest.raises(BackendUnavailableError, match="pooled"):
            attend(*given, tiles, backend=name, **routed)
        return
    assert calls[0]["index"] is calls[2]["index"]
    keep = torch.full((1, 2, 3, 1), 5, dtype=torch.int32)
    out, exact = attend(*given, full(300, 300, 128), backend=name, selection=Selection(keep=keep), return_tiles=True)
    assert torch.equal(exact, keep)
    assert torch.equal(out, attend(*given, lists_of([[2, 0, 2]] * 3, 128, 128, 300, 300), backend=name))


def test_plans_that_fail_leave_the_call_to_others(monkeypatch):
    library_stand_ins.install(monkeypatch)
    given, tiles = qkv(1, 1, 1, 300, 300, 64, HALF), lists(1, 300, 300, 128)
    for target, attribute, value, words in (
        (library_stand_ins, "broken", "plan", "memory for batch_prefill"),
        (flashinfer, "MOST_KEYS", 100, "graph"),
        (flashinfer, "capturing", lambda device: True, "graph"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, attribute, value)
            with pytest.raises(BackendUnavailableError, match=words):
                attend(*given, tiles, backend="flashinfer")


NO_PART = {
    "pooled": lambda: dict(tiles=random_lists(1, 300, 300, 128, 128)),
    "masks": lambda: dict(tiles=with_masks(full(300, 300, 128))),
    "decay": lambda: dict(frame_decay=frame_decay(300)),
    "votes": lambda: dict(selection=Selection(vote=Vote()), return_tiles=True),
    "hidden keys": lambda: dict(key_length=torch.tensor([200])),
    "float32": lambda: dict(dtype=torch.float32),
    "head dim": lambda: dict(dim=48),
}


@pytest.mark.parametrize("case", NO_PART)
def test_what_the_libraries_have_no_part_in_is_refused_in_one_line(name, case):
    more = NO_PART[case]()
    given = qkv(1, 1, 1, 300, 300, more.pop("dim", 64), more.pop("dtype", HALF))
    with pytest.raises(BackendUnavailableError, match=rf"^backend '{name}' .*{case}[^\n]*$"):
        attend(*given, more.pop("tiles", full(300, 300, 128)), backend=name, **more)


def test_what_a_card_and_a_package_must_be(monkeypatch):
    for arch, tile, dims, words in (
        ("sm_89", (128, 128), (64, 64), "sm_89"), ("gfx942", (128, 128), (64, 64), "gfx942"),
        ("sm_90", (128, 64), (64, 64), "128 x 64"), ("sm_90", (64, 64), (96, 96), None),
        ("sm_90", (64, 64), (64, 96), "64 and 96"), ("sm_100", (64, 64), (96, 96), "of 128 on sm_100"),
        ("sm_100", (128, 128), (96, 96), None), ("sm_120", (128, 128), (64, 64), "of 128 on sm_120"),
        ("sm_120", (64, 64), (128, 128), None), ("sm_110", (64, 64), (128, 128), None),
    ):  # fmt: skip
        library_stand_ins.install(monkeypatch, arch)
        found = cudnn_requirement(CPU, tile, dims)
        assert found is None if words is None else words in found
    for arch, dim, words in (("sm_75", 64, "8.0"), ("sm_89", 256, None), ("sm_120", 96, "96"), ("gfx942", 64, "gfx")):
        library_stand_ins.install(monkeypatch, arch)
        found = flashinfer_requirement(CPU, (dim, dim))
        assert found is None if words is None else words in found
    library_stand_ins.install(monkeypatch, "sm_100")
    for heads, dtype, refused in ((2, HALF, False), (1, HALF, True), (2, torch.float16, True)):
        given = qkv(1, 2, heads, 200, 200, 128, dtype)
        if refused:
            with pytest.raises(BackendUnavailableError, match=f"{dtype}, 2 and {heads}"):
                attend(*given, full(200, 200, 64), backend="cudnn")
        else:
            check_against_reference(*given, full(200, 200, 64), "cudnn", layout="bhsd")
    for ours, function in PACKAGES.values():
        monkeypatch.delattr(importlib.import_module(ours.__name__.rpartition(".")[2]), function)
        monkeypatch.setattr(importlib.metadata, "version", lambda package: "1.2.3")
        library.missing_package.cache_clear()
        assert f"{function} that can be imported (found 1.2.3" in ours.missing_requirement(CPU)
    library.missing_package.cache_clear()
    assert library.missing_package("no_such_module", "no-such", "f").endswith("pip install no-such)")


@pytest.mark.parametrize("name", PACKAGES)
def test_the_stand_ins_have_the_signatures_of_the_real_ones(name):
    ours, function = PACKAGES[name]
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{ours.PACKAGE} is not installed (the extra {name} of kernels/)")
    real, stand_in = getattr(importlib.import_module(name), function), getattr(library_stand_ins, function)
    pairs = [(real, stand_in)] if name == "cudnn" else [(real.plan, stand_in.plan), (real.run, stand_in.run)]
    for one, other in pairs:
        expected = [(x.name, x.kind, x.default) for x in inspect.signature(one).parameters.values()]
        assert [(x.name, x.kind, x.default) for x in inspect.signature(other).parameters.values()] == expected
