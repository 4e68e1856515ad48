"""The flex backend: what it refuses and says, its blocks, and its result, compiled and by the eager FlexAttention."""

import pytest
import torch
from dit_accel_kernels import (
    EXACT,
    POOLED,
    SKIPPED,
    BackendUnavailableError,
    FrameDecay,
    Selection,
    TileLists,
    Vote,
    block_sparse_attention,
)
from dit_accel_kernels.backends import flex as flex_backend
from kernel_cases import assert_within_rounding, qkv, random_lists, with_masks
from torch._dynamo.utils import counters

LISTS = random_lists(1, 40, 40, 16, 16)
COMPILES = pytest.mark.skipif(
    flex_backend.missing_requirement("cpu") is not None, reason="FlexAttention cannot compile here"
)


@pytest.mark.parametrize(
    ("tiles", "arguments", "text"),
    [
        (LISTS, dict(return_lse=True), r"'flex'.*LSE.*CPU.*'torch'.*'auto'"),
        (LISTS, dict(selection=Selection(vote=Vote())), r"'flex'.*no votes.*'torch'.*'auto'"),
        (random_lists(1, 40, 40, 8, 24), {}, r"block_q 8 and block_k 24.*2"),
    ],
)
def test_refuses_what_it_does_not_execute(tiles, arguments, text):
    q, k, v = qkv(1, 2, 2, 40, 40, 8, torch.float32)
    with pytest.raises(BackendUnavailableError, match=text):
        block_sparse_attention(q, k, v, tiles, layout="bhsd", backend="flex", **arguments)


def test_refuses_float64():
    q, k, v = qkv(1, 2, 2, 40, 40, 8, torch.float64)
    with pytest.raises(BackendUnavailableError, match=r"'flex'.*float64"):
        block_sparse_attention(q, k, v, LISTS, layout="bhsd", backend="flex")


def test_says_what_the_machine_lacks(monkeypatch):
    q, k, v = qkv(1, 2, 2, 40, 40, 8, torch.float32)
    monkeypatch.setattr(flex_backend.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    with pytest.raises(BackendUnavailableError, match=r"'flex'.*C\+\+ compiler"):
        block_sparse_attention(q, k, v, LISTS, layout="bhsd", backend="flex")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(BackendUnavailableError, match=r"'flex'.*CPU.*AVX2 \(found DEFAULT\)"):
        block_sparse_attention(q, k, v, LISTS, layout="bhsd", backend="flex")
    monkeypatch.setattr(flex_backend.importlib.util, "find_spec", lambda name: None)
    assert flex_backend.missing_requirement("cuda") == "the triton package"


def test_never_runs_the_eager_flexattention_which_reads_no_lists(monkeypatch):
    monkeypatch.setattr(flex_backend, "missing_requirement", lambda device_type: None)
    q, k, v = qkv(1, 2, 2, 40, 40, 8, torch.float32)
    text = r"'flex'.*torch.compile.*off.*'torch'"
    with torch.compiler.set_stance("force_eager"), pytest.raises(BackendUnavailableError, match=text):
        block_sparse_attention(q, k, v, LISTS, layout="bhsd", backend="flex")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
def test_a_gpu_kernels_steps_divide_the_tiles(block, dim, dtype):
    """FlexAttention's own are powers of 2 up to 128 and are kept where they divide the tiles whatever they are."""
    options = flex_backend._kernel_options(torch.empty(1, 1, 1, dim, dtype=dtype, device="meta"), block, block)
    steps = {options.get(name, 128) for name in ("BLOCK_M", "BLOCK_N")}
    assert all(block % step == 0 and step >= 16 for step in steps)


@pytest.fixture
def eager(monkeypatch) -> list:
    """The same functions and tables without a compiler, on any machine and with LSE; the calls' (columns, blocks)."""
    calls = []

    def run(q, columns, blocks, made_for):
        calls.append((columns, blocks))
        return flex_backend.flex_call(q, columns, blocks, made_for)

    monkeypatch.setattr(flex_backend, "_compiled", lambda: run)
    monkeypatch.setattr(flex_backend, "check", lambda problem, need_lse: None)
    return calls


def features(batch: int, heads: int, num_q: int, num_k: int, block_k: int, *, mask: bool, decay: bool) -> dict:
    """A head scale and, where asked for, keys of which a whole tile and some others are invalid, and frame decay."""
    found: dict = dict(layout="bhsd", head_scale=0.5 + torch.rand(batch, heads))
    if mask:
        valid = torch.rand(batch, num_k) < 0.7
        valid[0, : 2 * block_k] = False
        valid[-1, :block_k] = True
        found["key_mask"] = valid
    if decay:
        frames = (torch.arange(n, dtype=torch.int32) // 37 - 1 for n in (num_q, num_k))
        table = torch.tensor([1.0, 0.9, 0.5, 0.2])
        found["frame_decay"] = FrameDecay(**dict(zip(("q_frames", "k_frames"), frames, strict=True)), table=table)
    return found


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_only_tiles_with_an_invalid_key_and_seen_means_are_partial(eager):
    """Tiles of 16 x 32, 80 keys: the pooled columns are block 0, the key tiles blocks 1 to 3."""
    states = torch.tensor(
        [[EXACT, EXACT, POOLED], [EXACT, SKIPPED, EXACT], [SKIPPED, POOLED, SKIPPED]], dtype=torch.uint8
    )
    tiles = TileLists.from_states(states, block_q=16, block_k=32, num_q=40, num_k=80)
    q, k, v = qkv(2, 2, 2, 40, 80, 8, torch.float32)
    valid = torch.ones(2, 80, dtype=torch.bool)
    valid[1, 3] = valid[1, 32:64] = False  # tile 0 has 31 keys, tile 1 none
    call = dict(layout="bhsd", backend="flex")
    block_sparse_attention(q, k, v, tiles, **call)
    block_sparse_attention(q, k, v, tiles, **call)
    block_sparse_attention(q, k, v, tiles, key_mask=valid, **call)

    def rows(counts, indices, batch):
        return [row[:count].tolist() for row, count in zip(indices[batch, 0], counts[batch, 0], strict=True)]

    (columns, static), (_, again), (masked_columns, masked) = eager
    assert again is static
    assert rows(*static[:2], 0) == rows(*masked[:2], 0) == [[0], [], [0]]
    assert rows(*static[2:4], 0) == rows(*masked[2:4], 0) == [[1, 2], [1, 3], []]
    assert rows(*masked[:2], 1) == [[0, 1], [1], []]
    assert rows(*masked[2:4], 1) == [[], [3], []]
    assert columns.bias.shape == (1, 112)
    assert columns.bias.exp()[0, :4].round().tolist() == [32, 32, 16, 1]
    assert masked_columns.bias.exp()[1, :4].round().tolist() == [31, 1, 16, 1]


@pytest.mark.slow
@COMPILES
class TestCompiled:
    """Few shapes, since each set of features compiles for seconds."""

    SHAPE = (2, 4, 2, 300, 300, 64)

    @pytest.mark.parametrize(
        ("pooled", "mask", "decay", "dtype"),
        [
            (False, False, False, torch.float32),
            (True, True, True, torch.float32),
            (True, False, False, torch.bfloat16),
        ],
    )
    def test_agrees_with_the_specification_and_compiles_once(self, pooled, mask, decay, dtype):
        """Per-head lists, grouped heads, head scale, ragged tail, empty row; then other lists, masks and scales."""
        before = counters["stats"]["unique_graphs"]
        for _ in range(3):
            q, k, v = qkv(*self.SHAPE, dtype)
            tiles = random_lists(4, 300, 300, 64, 32, pooled=pooled)
            arguments = features(2, 4, 300, 300, 32, mask=mask, decay=decay)
            check_output(q, k, v, tiles, **arguments)
        assert counters["stats"]["unique_graphs"] - before <= 1  # 0 where another test made it

    def test_masks_inside_tiles_compile_once_and_read_no_more_blocks(self):
        """Full blocks stay full; values have a head dim of their own."""
        before = counters["stats"]["unique_graphs"]
        for _ in range(2):
            q, k, v = qkv(*self.SHAPE, torch.float32)
            check_output(q, k, v[..., :40], with_masks(random_lists(4, 300, 300, 64, 32, pooled=False)), layout="bhsd")
        assert counters["stats"]["unique_graphs"] - before == 1

    def test_one_query_over_many_keys_and_decay_alone(self):
        q, k, v = qkv(1, 2, 1, 1, 1100, 40, torch.float32)
        arguments = features(1, 2, 1, 1100, 64, mask=False, decay=True)
        check_output(q, k, v, random_lists(1, 1, 1100, 64, 64, pooled=False), **arguments)

    def test_gradients_are_those_of_the_torch_backend(self):
        leaves = [x.requires_grad_() for x in qkv(*self.SHAPE, torch.float32)]
        tiles = random_lists(4, 300, 300, 64, 32, pooled=False)
        seed = torch.randn_like(leaves[0])
        found, expected = (
            torch.autograd.grad(block_sparse_attention(*leaves, tiles, layout="bhsd", backend=backend), leaves, seed)
            for backend in ("flex", "torch")
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_more_shapes_than_dynamos_limit_stay_compiled(monkeypatch):
    """Past recompile_limit Dynamo raises or goes on eagerly, and the eager FlexAttention reads no lists."""
    traced = torch.compile(flex_backend._compilable, backend="eager", dynamic=False, fullgraph=True)
    monkeypatch.setattr(flex_backend, "_compiled", lambda: traced)
    monkeypatch.setattr(flex_backend, "missing_requirement", lambda device_type: None)
    before = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(recompile_limit=1):
        for tiles in (random_lists(1, 33, 33, 16, 16), TileLists.full(34, 34, block_q=16, block_k=16)):
            q, k, v = qkv(1, 1, 1, tiles.num_q, tiles.num_q, 16, torch.float32)
            check_output(q, k, v, tiles, layout="bhsd")
    assert counters["stats"]["unique_graphs"] - before == 2


def check_output(q, k, v, tiles, **arguments) -> None:
    """The output against the reference in float64 on the same inputs."""
    wide = {name: x.double() if name == "head_scale" else x for name, x in arguments.items()}
    truth = block_sparse_attention(q.double(), k.double(), v.double(), tiles, backend="reference", **wide)
    yardstick = block_sparse_attention(q, k, v, tiles, backend="reference", **arguments)
    found = block_sparse_attention(q, k, v, tiles, backend="flex", **arguments)
    assert found.dtype == q.dtype
    assert_within_rounding(found, yardstick, truth, q.dtype)
