"""Backends of other libraries, cuDNN's front end and FlashInfer, by stand-ins that read the lists alone."""

import importlib
import importlib.metadata
import inspect
from itertools import product

import library_stand_ins
import pytest
import torch
from dit_accel_kernels import BackendUnavailableError, Selection, Vote, cudnn_requirement, flashinfer_requirement
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


CASES = {  # batch, heads, key heads, queries, keys, list sets, tile, layout; a row of tiles is empty in each
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
    *sizes, groups, side, layout = CASES[case]
    tiles = random_lists(groups, *sizes[3:], side, side, pooled=False)
    more = dict(head_scale=torch.linspace(0.8, 1.2, sizes[1])) if scaled else {}
    check_against_reference(*qkv(*sizes, 64, HALF, layout), tiles, name, layout=layout, **more)


def test_what_is_no_tensor_of_its_own_is_read_right(name):
    q, k, v = torch.randn(1, 300, 3, 2, 64).to(HALF)[:, 3:].unbind(2)  # of one product, 3 rows into it
    odd = torch.empty(q.numel() + 1, dtype=HALF)[1:].view(q.shape).copy_(q)  # whose rows begin at odd addresses
    for given in ((q, k, v), (odd, odd, odd)):
        check_against_reference(*given, random_lists(2, 297, 297, 128, 128, pooled=False), name, layout="bshd")


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
    given, tiles, keep = qkv(1, 2, 2, 300, 300, 64, HALF), full(300, 300, 128), torch.full((1, 2, 3, 1), 5).int()
    for _ in range(3):
        attend(*given, tiles, backend=name)
    assert len({id(x) for x in library_stand_ins.calls}) == 1
    call = dict(backend=name, selection=Selection(keep=keep), return_tiles=True)
    if name == "flashinfer":
        with pytest.raises(BackendUnavailableError, match="plans lists"):
            attend(*given, tiles, **call)
        return
    out, exact = attend(*given, tiles, **call)
    assert torch.equal(exact, keep)
    assert torch.equal(out, attend(*given, lists_of([[2, 0, 2]] * 3, 128, 128, 300, 300), backend=name))


def test_plans_that_fail_leave_the_call_to_others(monkeypatch):
    library_stand_ins.install(monkeypatch)
    plants = ((library_stand_ins, "broken", "plan"), (flashinfer, "MOST_KEYS", 100), (flashinfer, "capturing", bool))
    for holder, attribute, value in plants:
        with monkeypatch.context() as patch:
            patch.setattr(holder, attribute, value)
            with pytest.raises(BackendUnavailableError, match=r"plans (no|nothing)[^\n]*$"):
                attend(*qkv(1, 1, 1, 300, 300, 64, HALF), full(300, 300, 128), backend="flashinfer")


NO_PART = {
    "pooled": lambda: dict(tiles=random_lists(1, 300, 300, 128, 128)),
    "masks": lambda: dict(tiles=with_masks(full(300, 300, 128))),
    "decay": lambda: dict(frame_decay=frame_decay(300)),
    "votes": lambda: dict(selection=Selection(vote=Vote())),
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
        ("sm_90", (128, 64), (64, 64), "128 x 64"), ("sm_90", (64, 64), (96, 96), ""),
        ("sm_90", (64, 64), (64, 96), "64 and 96"), ("sm_100", (64, 64), (96, 96), "of 128 on sm_100"),
        ("sm_100", (128, 128), (96, 96), ""), ("sm_120", (128, 128), (64, 64), "of 128 on sm_120"),
        ("sm_120", (64, 64), (128, 128), ""), ("sm_75", None, (64, 64), "8.0"), ("sm_89", None, (256, 256), ""),
        ("sm_120", None, (96, 96), "96"), ("sm_90", None, (64, 128), "64 and 128"),
    ):  # fmt: skip
        library_stand_ins.install(monkeypatch, arch)
        found = cudnn_requirement(CPU, tile, dims) if tile else flashinfer_requirement(CPU, dims)
        assert words in (found or "")
        assert bool(words) == bool(found)
    library_stand_ins.install(monkeypatch, "sm_100")
    for heads, dtype in ((1, HALF), (2, torch.float16)):  # of tiles of 64
        with pytest.raises(BackendUnavailableError, match=f"{dtype}, 2 and {heads}"):
            attend(*qkv(1, 2, heads, 200, 200, 128, dtype), full(200, 200, 64), backend="cudnn")
    attend(*qkv(1, 2, 2, 200, 200, 128, HALF), full(200, 200, 64), backend="cudnn")
    for leaf, (ours, function) in PACKAGES.items():
        monkeypatch.delattr(importlib.import_module(leaf), function)
        monkeypatch.setattr(importlib.metadata, "version", lambda package: "1.2.3")
        library.missing_package.cache_clear()
        assert f"{function} that can be imported (found 1.2.3" in ours.missing_requirement(CPU)
    library.missing_package.cache_clear()
    assert library.missing_package("no_such_module", "no-such", "f").endswith("pip install no-such)")


@pytest.mark.parametrize(("leaf", "method"), [("cudnn", None), ("flashinfer", "plan"), ("flashinfer", "run")])
def test_the_stand_ins_have_the_signatures_of_the_real_ones(leaf, method):
    ours, function = PACKAGES[leaf]
    if importlib.util.find_spec(leaf) is None:
        pytest.skip(f"{ours.PACKAGE} is not installed (the extra {leaf})")
    both = (getattr(importlib.import_module(leaf), function), getattr(library_stand_ins, function))
    signatures = (inspect.signature(getattr(x, method) if method else x).parameters.values() for x in both)
    real, stand_in = ([(x.name, x.kind, x.default) for x in one] for one in signatures)
    assert stand_in == real
