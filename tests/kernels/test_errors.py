"""What calls, lists, masks, selections and decays refuse: by the name of what is wrong, with its value."""

from dataclasses import replace

import pytest
import torch
from dit_accel_kernels import EXACT, FrameDecay, Routing, Selection, TileLists, Vote
from dit_accel_kernels import csr as csr_module
from kernel_cases import attend, frame_decay, full, lists_of, qkv, random_lists, with_masks
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

Q, K, V = qkv(2, 4, 2, 20, 20, 8, torch.float32)
TILES = random_lists(1, 20, 20, 8, 8)
MASKED = with_masks(random_lists(1, 20, 20, 8, 8, pooled=False))
CROSS = dict(k=K[:, :, :12], v=V[:, :, :12], tiles=full(20, 12, 8))
BITS = torch.zeros(2, 4, 3, 1, dtype=torch.int32)  # of three block rows and a word of key tiles
FOUR = torch.ones(4)
ROWS = torch.ones(20, dtype=torch.bool)


def ints(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_calls():
    for changes, error, text in (
        (dict(layout="sbhd"), ValueError, "layout.*'bshd'.*'bhsd', found 'sbhd'"),
        (dict(backend="cuddn"), ValueError, "backend.*auto, triton, cudnn, fa4, flash.*found 'cuddn'"),
        (dict(q=Q[0]), ValueError, r"q.*dimensions.*found \[4, 20, 8\]"),
        (dict(v=V[..., :0]), ValueError, r"v.*at least 1, found \[2, 2, 20, 0\]"),
        (dict(q=Q.long()), TypeError, r"q.*bfloat16, float16, float32.*float64, found torch\.int64"),
        (dict(k=K.double()), TypeError, r"dtype.*q torch\.float32, k torch\.float64, v torch\.float32"),
        (dict(v=V.to("meta")), ValueError, "device.*cpu.*on meta"),
        (dict(v=V[:, :, :19]), ValueError, r"k .*v .*found \[2, 2, 20, 8\] and \[2, 2, 19, 8\]"),
        (dict(q=Q[:1]), ValueError, r"head dim, found \[1, 4, 20, 8\] and \[2, 2, 20, 8\] \(bhsd\)"),
        (dict(q=Q[..., :4]), ValueError, r"head dim, found \[2, 4, 20, 4\] and \[2, 2, 20, 8\]"),
        (dict(q=Q[:, :3]), ValueError, "key heads.*found 2 and 3"),
        (dict(tiles=full(20, 21, 8)), ValueError, "20 queries and 21 keys, found 20 and 20"),
        (dict(tiles=random_lists(3, 20, 20, 8, 8)), ValueError, r"1, 4 \(H\).*8 \(B\*H\).*found 3"),
        (dict(tiles=TILES.to("meta")), ValueError, r"meta.*cpu.*tiles\.to\('cpu'\)"),
        (dict(head_scale=torch.ones(3)), ValueError, r"head_scale.*\[4\].*\[2, 4\].*found \[3\]"),
        (dict(head_scale=FOUR.int()), TypeError, r"head_scale.*found torch\.int32"),
        (dict(head_scale=FOUR.to("meta")), ValueError, "head_scale.*cpu.*found meta"),
        (dict(identity_mix=FOUR.clone().requires_grad_()), ValueError, "identity_mix.*found requires_grad=True"),
        (dict(identity_mix=FOUR[None]), ValueError, r"identity_mix.*\[4\].*\[2, 4\]"),
        (dict(identity_rows=ROWS), ValueError, "identity_rows.*identity_mix"),
        (dict(identity_mix=FOUR, identity_rows=ROWS.float()), TypeError, r"identity_rows.*torch\.bool"),
        (dict(key_length=torch.tensor([20.0, 20.0])), TypeError, r"key_length.*found torch\.float32"),
        (dict(key_length=torch.tensor([True, True])), TypeError, r"key_length.*found torch\.bool"),
        (dict(key_length=torch.tensor([20])), ValueError, r"key_length.*\[2\], found \[1\]"),
        (dict(key_length=torch.tensor([1, 2]).to("meta")), ValueError, "key_length.*cpu.*found meta"),
        (dict(key_mask=ROWS[:19].expand(2, -1)), ValueError, r"key_mask.*\[2, 20\].*found \[2, 19\]"),
        (dict(key_mask=torch.ones(2, 20)), TypeError, r"key_mask.*torch\.bool, found torch\.float32"),
        (dict(token_order=torch.arange(19)), ValueError, r"token_order.*\[20\].*found \[19\]"),
        (dict(token_order=torch.arange(20).int()), TypeError, r"token_order.*torch\.int64, found torch\.int32"),
        (dict(token_order=torch.zeros(20).long()), ValueError, "token_order.*found token 0 20 times"),
        (dict(token_order=torch.arange(1, 21)), ValueError, r"token_order.*0\.\.19 .*found 20 at position 19"),
        (dict(frame_decay=frame_decay(19, 20)), ValueError, r"frame_decay\.q_frames.*\[20\].*found \[19\]"),
        (dict(frame_decay=frame_decay(20, table=FOUR.to("meta"))), ValueError, r"frame_decay\.table.*cpu.*found meta"),
        (dict(frame_decay=frame_decay(20, 21)), ValueError, r"frame_decay\.k_frames.*\[20\].*found \[21\]"),
        (dict(CROSS, token_order=torch.arange(20)), ValueError, "token_order.*found 20 queries and 12"),
        (dict(CROSS, identity_mix=FOUR), ValueError, "identity_mix.*found 20 queries and 12"),
        (dict(selection=Selection(keep=BITS.float())), TypeError, r"selection\.keep.*torch\.int32.*torch\.float32"),
        (dict(selection=Selection(keep=BITS[:1])), ValueError, r"selection\.keep.*\[2, 4, 3, 1\].*\[1, 4, 3, 1\]"),
        (dict(selection=Selection(pinned=BITS[0, 0, :2])), ValueError, r"selection\.pinned.*\[3, 1\].*found \[2, 1\]"),
        (dict(selection=Selection(routed=BITS[:, :3])), ValueError, r"selection\.routed.*\[2, 3, 3, 1\]"),
        (dict(selection=Selection(routed=BITS.to("meta"))), ValueError, r"selection\.routed.*cpu.*found meta"),
        (dict(return_tiles=True), ValueError, "return_tiles.*no selection"),
        (dict(tiles=MASKED, selection=Selection()), ValueError, "selection.*masks.*one of both"),
    ):
        with pytest.raises(error, match=text):
            attend(**{**dict(q=Q, k=K, v=V, tiles=TILES), **changes})


def test_decays_selections_and_states():
    two, four = torch.ones(2), ints(0, 0, 0, 0)

    def decay(**values):
        return FrameDecay(**{**dict(table=two, q_frames=four, k_frames=four), **values})

    def states(values):
        return TileLists.from_states(values, block_q=4, block_k=4, num_q=8, num_k=12)

    for make, error, text in (
        (lambda: decay(table=two.double()), ValueError, r"table.*float32.*found torch\.float64 \[2\]"),
        (lambda: decay(table=two[:0]), ValueError, r"table.*float32.*\[0\]"),
        (lambda: decay(q_frames=four.long()), ValueError, r"q_frames.*int32.*found torch\.int64 \[4\]"),
        (lambda: decay(k_frames=four[None]), ValueError, r"k_frames.*int32.*found torch\.int32 \[1, 4\]"),
        (lambda: Routing(threshold="other"), ValueError, "threshold.*'diag'.*'exact', found 'other'"),
        (lambda: Vote(criterion="sum"), ValueError, "criterion.*'maxgap', 'mass'.*'budget', found 'sum'"),
        (lambda: Vote(criterion="mass", threshold=0.0), ValueError, r"threshold.*'mass'.*\(0, 1\), found 0"),
        (lambda: Vote(criterion="budget", threshold=1.0), ValueError, r"threshold.*'budget'.*\(0, 1\), found 1"),
        (lambda: Selection(rest="drop"), ValueError, "rest.*'skip'.*'pooled', found 'drop'"),
        (lambda: Selection(routed=BITS, routing=Routing()), ValueError, "routed.*routing.*both"),
        (lambda: states(torch.zeros(2, 3)), TypeError, r"states.*torch\.uint8, found torch\.float32"),
        (lambda: states(torch.zeros(3, 3).byte()), ValueError, r"states.*\[G, 2, 3\].*8 x 12 tokens.*4 x 4"),
        (lambda: states(torch.full((2, 3), 7).byte()), ValueError, "states.*0.*found 7"),
        (lambda: full(0, 63), ValueError, "num_q.*1, found 0"),
    ):
        with pytest.raises(error, match=text):
            make()


def lists(**changes) -> TileLists:
    parts = dict(exact_offsets=ints([0, 2, 3]), exact_indices=ints(0, 2, 1))
    return TileLists(**{**dict(block_q=4, block_k=4, num_q=8, num_k=12), **parts, **changes})


def test_lists(monkeypatch):
    one = dict(pooled_indices=ints(1))
    for changes, error, text in (
        (dict(block_q=0), ValueError, "block_q.*1, found 0"),
        (dict(num_k=-3), ValueError, "num_k.*1, found -3"),
        (dict(exact_offsets=ints([0, 3])), ValueError, r"exact_offsets.*\[G, 3\].*2.*found \[1, 2\]"),
        (dict(exact_indices=ints([0, 2, 1])), ValueError, r"exact_indices.*found \[1, 3\]"),
        (dict(exact_indices=torch.zeros(3)), TypeError, r"exact_indices.*torch\.int32, found torch\.float32"),
        (dict(exact_indices=ints(0, 2, 1).to("meta")), ValueError, "device, found cpu.*meta"),
        (one, ValueError, "pooled_offsets and pooled_indices.*both"),
        (dict(one, pooled_offsets=ints([0, 0, 0], [0, 0, 1])), ValueError, r"exact_offsets, \(1, 3\).*found \(2, 3\)"),
    ):
        with pytest.raises(error, match=text):
            lists(**changes)
    for changes, text in (
        (dict(exact_indices=ints(0, 3, 1)), r"0\.\.2 \(NK = 3 key tiles\), found 3 at position 1.*query tile 0"),
        (dict(exact_indices=ints(-1, 2, 1)), r"exact_indices.*0\.\.2.*found -1 at position 0"),
        (dict(exact_offsets=ints([0, 1, 2], [2, 2, 3]), exact_indices=ints(0, 2, 3)), "position 2.*tile 1.*set 1"),
        (dict(exact_indices=ints(2, 0, 1)), "found 0 after 2 at position 1.*query tile 0.*set 0"),
        (dict(exact_indices=ints(2, 2, 1)), "exact_indices.*ascend"),
        (dict(exact_offsets=ints([0, 2, 2])), r"exact_offsets.*0 to 3, found \[0, 2, 2\]"),
        (dict(exact_offsets=ints([0, 4, 3])), r"exact_offsets.*0 to 3, found \[0, 4, 3\]"),
        (dict(exact_offsets=ints([0, 1, 2], [0, 2, 3])), r"exact_offsets.*list set.*found \[0\] after \[2\]"),
        (dict(one, pooled_offsets=ints([0, 0, 1])), "exact .*pooled.*tile 1 twice.*query tile 1"),
        (dict(pooled_indices=ints(9), pooled_offsets=ints([0, 0, 1])), r"pooled_indices.*found 9 at position 0"),
    ):
        with pytest.raises(ValueError, match=text):
            lists(**changes).validate()
    empty = lists(exact_offsets=ints([0, 0, 0]), exact_indices=ints())
    assert empty.validate() is empty
    monkeypatch.setattr(csr_module, "_INT32_MAX", 8)
    full(32, 16, 8)
    with pytest.raises(ValueError, match=r"tile lists.*8 entries, found 9"):
        lists_of(torch.full((3, 3), EXACT), 8, 8, 20, 20)


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def test_masks():
    sizes, five = dict(block_q=4, block_k=4), torch.tensor([0, 5])
    ones, mask, packed, ruled = torch.ones, TileLists.from_mask, TileLists.from_cu_seqlens, TileLists.from_mask_mod
    long, wrong = dict(num_q=9, num_k=9, **sizes), create_block_mask(causal, 2, None, 9, 9, device="cpu", BLOCK_SIZE=4)
    short = BlockMask.from_kv_blocks(ones(1, 1, 2).int(), ones(1, 1, 2, 2).int(), BLOCK_SIZE=4, seq_lengths=(30, 8))
    for make, error, text in (
        (lambda: mask(ones(4, 4), **sizes), TypeError, r"mask.*bool.*torch\.float32"),
        (lambda: mask(ones(4, 4).bool(), block_q=0, block_k=4), ValueError, "block_q.*1, found 0"),
        (lambda: mask(ones(4).bool(), **sizes), ValueError, r"S_q.*\[4\]"),
        (lambda: TileLists.from_block_mask(ones(4, 4)), TypeError, "block_mask.*BlockMask, found Tensor"),
        (lambda: TileLists.from_block_mask(wrong), ValueError, "block_mask of 2 x 1"),
        (lambda: TileLists.from_block_mask(short), ValueError, r"\[8, 2\].*4 x 4.*30 queries and 8.*found \[2, 2\]"),
        (lambda: ruled(lambda b, h, q, k: q - k, **long), TypeError, r"mask_mod.*torch\.bool.*found torch\.int64"),
        (lambda: ruled(causal, batch=2, **long), ValueError, "batch=2.*heads=None"),
        (lambda: random_lists(1, 20, 20, 4, 4).to_block_mask(), ValueError, r"BlockMask.*pooled.*found \d+"),
        (lambda: full(8, 8, 4).to_block_mask(2), ValueError, "heads.*1 list.*found 2"),
        (lambda: packed(five.float(), **sizes), TypeError, r"cu_q.*int32 or torch\.int64.*torch\.float32"),
        (lambda: packed(five[:1], **sizes), ValueError, r"cu_q.*\[N \+ 1\].*found \[1\]"),
        (lambda: packed(torch.tensor([0, 5, 3]), **sizes), ValueError, r"cu_q.*0.*found \[0, 5, 3\]"),
        (lambda: packed(five * 0, **sizes), ValueError, "num_q.*1, found 0"),
        (lambda: packed(five, five + 1, **sizes), ValueError, r"cu_k.*0.*found \[1, 6\]"),
        (lambda: packed(five, torch.tensor([0, 2, 5]), **sizes), ValueError, "cu_q and cu_k.*found 1.*cpu.*2.*cpu"),
    ):
        with pytest.raises(error, match=text):
            make()
    for ids, bits, error, text in (
        (ints(0, 0), None, ValueError, "mask_ids and mask_bits.*both"),
        (ints(0), (1, 4, 1), ValueError, r"mask_ids.*\[2\].*found \[1\]"),
        (ints(0, 0), (1, 5, 1), ValueError, r"mask_bits.*\[M, 4, 1\].*found \[1, 5, 1\]"),
        (ints(0, 0), (0, 4, 1), ValueError, r"mask_bits.*M >= 1.*found \[0, 4, 1\]"),
        (ints(0, 2), (2, 4, 1), ValueError, r"mask_ids.*-1\.\.1 \(2 masks\), found 2 at position 1"),
        (ints(-2, 0), (2, 4, 1), ValueError, r"mask_ids.*-1\.\.1.*found -2 at position 0"),
    ):
        masks = dict(mask_ids=ids, mask_bits=None if bits is None else torch.zeros(bits, dtype=torch.int32))
        with pytest.raises(error, match=text):
            attend(*qkv(1, 1, 1, 4, 8, 8, torch.float32), replace(lists_of([[2, 2]], 4, 4, 4, 8), **masks))
    tiles = TileLists.from_block_mask(create_block_mask(causal, None, None, 40, 40, device="cpu", BLOCK_SIZE=16))
    with pytest.raises(ValueError, match="40 queries and 40 keys, found 30 and 30"):
        attend(*qkv(1, 1, 1, 30, 30, 8, torch.float32), tiles)
