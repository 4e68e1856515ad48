"""NaN and infinity: what a row sees it hands on, so that a model that diverged looks it; what it doesn't is nothing."""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

from itertools import product

import pytest
import torch
from dit_accel_kernels import EXACT, Selection, TileLists, Vote
from dit_accel_kernels.api import block_sparse_attention_backward, block_sparse_attention_eager
from dit_accel_kernels.features import product_dtype
from kernel_cases import attend, frame_decay, lists_of, qkv, random_lists
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter's numpy
TOKENS, BLOCK = 60, 16
STATES = torch.tensor([[2, 1, 2, 0], [0, 2, 0, 1], [1, 1, 1, 1], [2, 0, 0, 2]])
TILES, EXACT_ONLY = (lists_of(x, BLOCK, BLOCK, TOKENS, TOKENS) for x in (STATES, STATES.where(STATES == EXACT, 0)))
FEATURES = {
    "plain": {},
    "masked": {"key_mask": torch.arange(TOKENS)[None] % 5 > 0},
    "decay": {"frame_decay": frame_decay(TOKENS, frame=9, table=(1.0, 0.6), first=0)},
    "votes": {"selection": Selection(vote=Vote())},
    "mass": {"selection": Selection(vote=Vote(criterion="mass", threshold=0.1))},
}
EVERY_FEATURE = pytest.mark.parametrize("feature", FEATURES)
BACKENDS = pytest.mark.parametrize("backend", ["loop", "operations", "triton"], indirect=True)
ALL_BACKENDS = pytest.mark.parametrize("backend", ["loop", "operations", "triton", "reference"], indirect=True)
BAD = (torch.nan, torch.inf, -torch.inf)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return qkv(1, 1, 1, TOKENS, TOKENS, 16, torch.float32)


def call(backend: str, q: Tensor, k: Tensor, v: Tensor, tiles: TileLists = TILES, **arguments) -> tuple[Tensor, Tensor]:
    return attend(q, k, v, tiles, return_lse=True, backend=backend, **arguments)[:2]


def bad_rows(out: Tensor) -> Tensor:
    """Which rows of the output hold anything that is not finite, [S]."""
    return ~out[0, 0].isfinite().all(-1)


def rows_of(tiles: list[int]) -> Tensor:
    """The rows of some query tiles, bool [S]."""
    return torch.isin(torch.arange(TOKENS) // BLOCK, torch.tensor(tiles))


@EVERY_FEATURE
@BACKENDS
def test_a_query_that_is_no_number_is_one_row_that_is_none(backend, feature):
    q, k, v = inputs()
    clean, _ = call(backend, q, k, v, **FEATURES[feature])
    others = torch.arange(TOKENS) != 21
    for value in BAD:
        q[0, 0, 21, 3] = value
        out, lse = call(backend, q, k, v, **FEATURES[feature])
        assert bad_rows(out).nonzero().flatten().tolist() == [21]
        assert not lse[0, 0, 21].isfinite()
        assert torch.equal(out[:, :, others], clean[:, :, others])
        assert lse[:, :, others].isfinite().all()


@EVERY_FEATURE
@BACKENDS
def test_a_key_that_is_no_number_reaches_the_rows_that_see_it(backend, feature):
    """As an exact key, as part of a mean, in the ragged tile."""
    q, k, v = inputs()
    clean, _ = call(backend, q, k, v, **FEATURES[feature])
    for token, tiles in ((1, [0, 2, 3]), (17, [0, 1, 2]), (59, [1, 2, 3])):
        bad = k.clone()
        bad[0, 0, token, 3] = torch.nan
        out, lse = call(backend, q, bad, v, **FEATURES[feature])
        if backend == "triton":  # walks the means of tiles that a row skips too, and there NaN less infinity is NaN
            assert bad_rows(out)[rows_of(tiles)].all()
            continue
        assert torch.equal(bad_rows(out), rows_of(tiles))
        assert torch.equal(~lse[0, 0].isfinite(), rows_of(tiles))
        assert torch.equal(out[:, :, ~rows_of(tiles)], clean[:, :, ~rows_of(tiles)])


@BACKENDS
def test_a_value_that_is_no_number_reaches_the_rows_that_see_it(backend):
    q, k, v = inputs()
    v[0, 0, 17, 3] = torch.nan
    out, lse = call(backend, q, k, v)
    assert torch.equal(bad_rows(out), rows_of([0, 1, 2]))
    assert out[..., :3].isfinite().all()
    assert lse.isfinite().all()


@ALL_BACKENDS
def test_a_row_without_a_valid_key_gives_0_and_a_logit_of_minus_infinity_weighs_nothing(backend):
    """Whatever the row's query is; its tiles are whole, or the ragged one is among them."""
    for value, (token, absent) in product(BAD, ((0, [0, 2]), (48, [0, 3]))):
        q, k, v = inputs()
        q[0, 0, token] = value
        out, lse = call(backend, q, k, v, EXACT_ONLY, key_mask=~rows_of(absent)[None])
        assert torch.equal(out[0, 0, token], torch.zeros(16))
        assert lse[0, 0, token] == -torch.inf
    q, k, v = (x.abs() for x in inputs())
    k[0, 0, 1, 3] = -torch.inf
    for scale in (1.0, 0.3):
        expected = call(backend, q, k, v, EXACT_ONLY, scale=scale, key_mask=torch.arange(TOKENS)[None] != 1)
        torch.testing.assert_close(call(backend, q, k, v, EXACT_ONLY, scale=scale), expected)


@pytest.mark.parametrize("feature", ["plain", "masked"])
@ALL_BACKENDS
def test_gradients_hand_it_on_and_logits_of_minus_infinity_are_no_row_without_keys(backend, feature):
    q, k, v = inputs()
    q[0, 0, 21, 3] = torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    grad_q, *others = torch.autograd.grad(call(backend, *leaves, **FEATURES[feature])[0].sum(), leaves)
    assert not grad_q[0, 0, 21].isfinite().any()
    assert grad_q[0, 0, :16].isfinite().all()
    assert not any(grad.isfinite().all() for grad in others)
    q, k, v = (x.detach().nan_to_num().abs() for x in leaves)
    q[0, 0, 21, 3] = -torch.inf
    if backend != "triton":
        out, _ = call(backend, q, k, v, **FEATURES[feature])
        assert bad_rows(out).nonzero().flatten().tolist() == [21]


class Products(TorchDispatchMode):
    """Counts matrix products, and refuses factors that are not finite."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        factors = {"mm": args[:2], "bmm": args[:2], "addmm": args[1:3], "baddbmm": args[1:3], "baddbmm_": args[1:3]}
        for x in factors.get(op.overloadpacket.__name__, ()):
            self.count += 1
            assert x.isfinite().all(), f"{op} multiplies what is no number"
        return op(*args, **kwargs or {})


@pytest.fixture
def in_bfloat16(monkeypatch):
    """A processor that multiplies bfloat16."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
        product_dtype.cache_clear()
        yield
    product_dtype.cache_clear()


@pytest.mark.sample
@pytest.mark.usefixtures("in_bfloat16")
@pytest.mark.parametrize("way", ["exact", "pooled", "decay", "votes", "mass", "inside"])
@pytest.mark.parametrize("backend", ["operations", "reference"], indirect=True)
def test_nothing_that_is_no_number_is_multiplied(backend, way):
    """Rows without a key too: where the inner size is odd, oneDNN on AMX lets NaN of bfloat16 spoil the row before."""
    rows, keys = torch.arange(150)[:, None], torch.arange(205)
    arguments = {"layout": "bhsd", "backend": backend}
    if way != "inside":
        arguments["key_mask"] = torch.stack([keys % 5 > 0, keys < 0])
    if way in FEATURES:
        arguments["selection"] = FEATURES[way].get("selection")
    if way == "decay":
        arguments["frame_decay"] = frame_decay(150, 205, 31, (1.0, 0.6), first=0)
    for dim, (block_q, block_k) in product((5, 24, 40), ((7, 33), (13, 101), (64, 45))):
        tiles = random_lists(2, 150, 205, block_q, block_k, pooled=way != "exact")
        if way == "inside":
            tiles = TileLists.from_mask((keys < rows) & (rows % 29 != 3), block_q=block_q, block_k=block_k)
        q, k, v = qkv(2, 2, 1, 150, 205, dim, torch.bfloat16)
        with Products() as products:
            block_sparse_attention_eager(q, k, v, tiles, return_lse=True, **arguments)
            block_sparse_attention_backward(torch.randn_like(q), q, k, v, tiles, **arguments)
        assert products.count
