"""Every error text of the attention call, with the value it names."""

from dataclasses import replace

import pytest
import torch
from dit_accel_kernels import EXACT, FrameDecay, Routing, Selection, TileLists, block_sparse_attention
from dit_accel_kernels import csr as csr_module
from kernel_cases import qkv, random_lists

Q, K, V = qkv(2, 4, 2, 20, 20, 8, torch.float32)
TILES = random_lists(1, 20, 20, 8, 8)
CROSS = dict(k=K[:, :, :12], v=V[:, :, :12], tiles=TileLists.full(20, 12, block_q=8, block_k=8))


BITS = torch.zeros(2, 4, 3, 1, dtype=torch.int32)  # of three block rows and a word of key tiles


def frames(count, dtype=torch.int32):
    return torch.zeros(count, dtype=dtype)


def decay(table=None, q=20, k=20):
    return FrameDecay(table=torch.ones(2) if table is None else table, q_frames=frames(q), k_frames=frames(k))


CASES = [
    (dict(layout="sbhd"), ValueError, r"layout.*'bshd'.*'bhsd', found 'sbhd'"),
    (
        dict(backend="cudnn"),
        ValueError,
        r"backend.*auto, triton, fa4, torch, flex.*found 'cudnn'",
    ),
    (dict(q=Q[0]), ValueError, r"q.*dimensions.*found \[4, 20, 8\]"),
    (dict(v=V[..., :0]), ValueError, r"v.*at least 1, found \[2, 2, 20, 0\]"),
    (dict(q=Q.long()), TypeError, r"q.*bfloat16, float16, float32.*float64, found torch\.int64"),
    (
        dict(k=K.double()),
        TypeError,
        r"dtype.*q torch\.float32, k torch\.float64, v torch\.float32",
    ),
    (dict(v=V.to("meta")), ValueError, "device.*cpu.*on meta"),
    (dict(v=V[:, :, :19]), ValueError, r"k .*v .*found \[2, 2, 20, 8\] and \[2, 2, 19, 8\]"),
    (dict(q=Q[:1]), ValueError, r"head dim, found \[1, 4, 20, 8\] and \[2, 2, 20, 8\] \(bhsd\)"),
    (dict(q=Q[..., :4]), ValueError, r"head dim, found \[2, 4, 20, 4\] and \[2, 2, 20, 8\]"),
    (dict(q=Q[:, :3]), ValueError, r"key heads.*found 2 and 3"),
    (
        dict(tiles=TileLists.full(20, 21, block_q=8, block_k=8)),
        ValueError,
        "20 queries and 21 keys, found 20 and 20",
    ),
    (dict(tiles=random_lists(3, 20, 20, 8, 8)), ValueError, r"1, 4 \(H\).*8 \(B\*H\).*found 3"),
    (dict(tiles=TILES.to("meta")), ValueError, r"meta.*cpu.*tiles\.to\('cpu'\)"),
    (dict(head_scale=torch.ones(3)), ValueError, r"head_scale.*\[4\].*\[2, 4\].*found \[3\]"),
    (dict(head_scale=torch.ones(4).int()), TypeError, r"head_scale.*found torch\.int32"),
    (
        dict(identity_mix=torch.ones(4, requires_grad=True)),
        ValueError,
        r"identity_mix.*found requires_grad=True",
    ),
    (dict(head_scale=torch.ones(4).to("meta")), ValueError, r"head_scale.*cpu.*found meta"),
    (dict(identity_mix=torch.ones(1, 4)), ValueError, r"identity_mix.*\[4\].*\[2, 4\]"),
    (
        dict(identity_rows=torch.ones(20, dtype=torch.bool)),
        ValueError,
        r"identity_rows.*identity_mix",
    ),
    (dict(identity_mix=torch.ones(4), identity_rows=torch.ones(20)), TypeError, r"identity_rows.*torch\.bool"),
    (
        dict(key_length=torch.tensor([20.0, 20.0])),
        TypeError,
        r"key_length.*found torch\.float32",
    ),
    (dict(key_length=torch.tensor([20])), ValueError, r"key_length.*\[2\] \(\[B\]\), found \[1\]"),
    (dict(key_length=torch.tensor([1, 2]).to("meta")), ValueError, r"key_length.*cpu.*found meta"),
    (dict(key_mask=torch.ones(2, 19, dtype=torch.bool)), ValueError, r"key_mask.*\[2, 20\].*found \[2, 19\]"),
    (dict(key_mask=torch.ones(2, 20)), TypeError, r"key_mask.*torch\.bool, found torch\.float32"),
    (dict(token_order=torch.arange(19)), ValueError, r"token_order.*\[20\].*found \[19\]"),
    (dict(token_order=torch.arange(20).int()), TypeError, r"token_order.*torch\.int64, found torch\.int32"),
    (dict(frame_decay=decay(q=19)), ValueError, r"frame_decay\.q_frames.*\[20\].*found \[19\]"),
    (dict(frame_decay=decay(k=21)), ValueError, r"frame_decay\.k_frames.*\[20\].*found \[21\]"),
    (
        dict(CROSS, token_order=torch.arange(20)),
        ValueError,
        r"token_order.*found 20 queries and 12",
    ),
    (
        dict(CROSS, identity_mix=torch.ones(4)),
        ValueError,
        r"identity_mix.*found 20 queries and 12",
    ),
    (
        dict(selection=Selection(routed=BITS[:, :3])),
        ValueError,
        r"selection\.routed.*\[2, 4, 3, 1\].*found \[2, 3, 3, 1\]",
    ),
    (
        dict(selection=Selection(routed=BITS.to("meta"))),
        ValueError,
        r"selection\.routed.*cpu.*found meta",
    ),
]


@pytest.mark.parametrize(("changes", "error", "text"), CASES, ids=[c[2][:40] for c in CASES])
def test_refuses(changes, error, text):
    values = {**dict(q=Q, k=K, v=V, tiles=TILES, layout="bhsd"), **changes}
    with pytest.raises(error, match=text):
        block_sparse_attention(**values)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (dict(table=torch.ones(2).double()), r"table.*float32.*found torch\.float64 \[2\]"),
        (dict(table=torch.ones(0)), r"table.*float32.*\[0\]"),
        (dict(q_frames=frames(4, torch.int64)), r"q_frames.*int32.*found torch\.int64 \[4\]"),
        (dict(k_frames=frames(4)[None]), r"k_frames.*int32.*found torch\.int32 \[1, 4\]"),
    ],
)
def test_frame_decay_refuses(values, text):
    with pytest.raises(ValueError, match=text):
        FrameDecay(**{**dict(table=torch.ones(2), q_frames=frames(4), k_frames=frames(4)), **values})


@pytest.mark.parametrize(
    ("values", "error", "text"),
    [
        (dict(routed=BITS, routing=Routing()), ValueError, r"routed.*routing.*both"),
        (dict(routed=BITS.long()), TypeError, r"routed.*torch\.int32, found torch\.int64"),
        (dict(routed=BITS[0]), ValueError, r"routed.*4 dimensions, found \[4, 3, 1\]"),
    ],
)
def test_selection_refuses(values, error, text):
    with pytest.raises(error, match=text):
        Selection(**values)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ([0, 2, 1], r"indices.*ascend"),
        ([0, 1, 3], r"exact_indices.*0..2 .NK = 3 key tiles.*found 3 at position 2.*tile 0"),
    ],
    ids=["unsorted", "out of range"],
)
def test_values_of_lists_are_checked_on_demand(indices, text, compiled, monkeypatch):
    """On a CPU always (test_values.py); on a GPU behind this environment variable, since it waits for the device."""
    changed = torch.tensor([*indices, *indices, *indices], dtype=torch.int32)
    tiles = replace(TileLists.full(20, 20, block_q=8, block_k=8), exact_indices=changed)
    call = torch.compile(block_sparse_attention, backend="eager") if compiled else block_sparse_attention
    monkeypatch.setenv("DIT_ACCEL_VALIDATE", "1")
    with pytest.raises(ValueError, match=text):
        call(Q, K, V, tiles, layout="bhsd", backend="torch")


def test_more_entries_than_int32_holds(monkeypatch):
    monkeypatch.setattr(csr_module, "_INT32_MAX", 8)
    with pytest.raises(ValueError, match=r"tile lists.*8 entries, found 9"):
        TileLists.from_states(torch.full((3, 3), EXACT, dtype=torch.uint8), block_q=8, block_k=8, num_q=20, num_k=20)


def test_integer_inputs_never_reach_the_gradient():
    with pytest.raises(TypeError, match=r"q.*bfloat16, float16, float32.*float64, found torch\.int32"):
        block_sparse_attention(Q.int(), K.int(), V.int(), TILES, layout="bhsd")
