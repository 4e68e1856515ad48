"""The flex backend: what it refuses and says, its blocks, and its result, compiled and by the eager FlexAttention."""

import pytest
import torch
from dit_accel_kernels import BackendUnavailableError, Selection, Vote
from dit_accel_kernels.backends import flex as flex_backend
from kernel_cases import assert_within_rounding, attend, frame_decay, full, lists_of, qkv, random_lists, with_masks
from torch._dynamo.utils import counters

LISTS = random_lists(1, 40, 40, 16, 16)
MISSING = flex_backend.missing_requirement("cpu")
COMPILES = pytest.mark.skipif(MISSING is not None, reason=f"FlexAttention needs {MISSING}")


def refused(text: str, tiles=LISTS, dtype: torch.dtype = torch.float32, **arguments) -> None:
    with pytest.raises(BackendUnavailableError, match=text):
        attend(*qkv(1, 2, 2, 40, 40, 8, dtype), tiles, backend="flex", **arguments)


def test_what_it_does_not_execute_is_refused(monkeypatch):
    """The eager FlexAttention among it, which reads no lists."""
    refused("'flex'.*LSE.*CPU.*'torch'.*'auto'", return_lse=True)
    refused("'flex'.*no votes.*'torch'.*'auto'", selection=Selection(vote=Vote()))
    refused("block_q 8 and block_k 24.*2", random_lists(1, 40, 40, 8, 24))
    refused("'flex'.*float64", dtype=torch.float64)
    monkeypatch.setattr(flex_backend, "missing_requirement", lambda device_type: None)
    with torch.compiler.set_stance("force_eager"):
        refused("'flex'.*torch.compile.*off.*'torch'")


def test_what_the_machine_lacks_is_told(monkeypatch):
    monkeypatch.setattr(flex_backend.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    refused(r"'flex'.*C\+\+ compiler")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    refused(r"'flex'.*CPU.*AVX2 \(found DEFAULT\)")
    monkeypatch.setattr(flex_backend.importlib.util, "find_spec", lambda name: None)
    assert flex_backend.missing_requirement("cuda") == "the triton package"


def test_a_gpu_kernels_steps_divide_the_tiles():
    """FlexAttention's own are powers of 2 up to 128; steps of keys are small where their rows are long."""
    for block, dim, dtype, keys in (
        (16, 64, torch.float32, 16), (64, 64, torch.float32, 32), (64, 128, torch.bfloat16, 64),
        (32, 129, torch.bfloat16, 32), (64, 129, torch.bfloat16, 32),
    ):  # fmt: skip
        options = flex_backend._kernel_options(torch.empty(1, 1, 1, dim, dtype=dtype, device="meta"), block, block)
        assert options == {"FORCE_USE_FLEX_ATTENTION": True, "BLOCK_M": block, "BLOCK_N": keys}
    for block in (128, 256):
        options = flex_backend._kernel_options(torch.empty(1, 1, 1, 64, device="meta"), block, block)
        assert options == {"FORCE_USE_FLEX_ATTENTION": True}
    assert flex_backend._kernel_options(torch.empty(1, 1, 1, 64), 16, 16) == {"PARTITION_SIZE": 1}


@pytest.fixture
def eager(monkeypatch) -> list:
    """The same functions and tables without a compiler, on any machine and with LSE; the calls' (columns, blocks)."""
    calls = []

    def run(q, columns, blocks, made_for):
        assert not any(x.requires_grad for x in (q, columns.k, columns.v))  # which it refuses on a CPU
        calls.append((columns, blocks))
        return flex_backend.flex_call(q, columns, blocks, made_for)

    monkeypatch.setattr(flex_backend, "_compiled", lambda: run)
    monkeypatch.setattr(flex_backend, "check", lambda problem: None)
    return calls


def features(batch: int, heads: int, num_q: int, num_k: int, block_k: int, *, mask: bool, decay: bool) -> dict:
    """A head scale and, where asked for, keys of which a whole tile and some others are invalid, and frame decay."""
    arguments: dict = dict(head_scale=0.5 + torch.rand(batch, heads))
    if mask:
        valid = arguments["key_mask"] = torch.rand(batch, num_k) < 0.7
        valid[0, : 2 * block_k] = False
        valid[-1, :block_k] = True
    if decay:
        arguments["frame_decay"] = frame_decay(num_q, num_k, 37, (1.0, 0.9, 0.5, 0.2))
    return arguments


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_only_tiles_with_an_invalid_key_and_seen_means_are_partial(eager):
    """Tiles of 16 x 32, 80 keys: the pooled columns are block 0, the key tiles blocks 1 to 3."""
    given = [x.requires_grad_() for x in qkv(2, 2, 2, 40, 80, 8, torch.float32)]
    valid = torch.ones(2, 80, dtype=torch.bool)
    valid[1, 3] = valid[1, 32:64] = False  # tile 0 has 31 keys, tile 1 none
    tiles = lists_of([[2, 2, 1], [2, 0, 2], [0, 1, 0]], 16, 32, 40, 80)
    for mask in (None, None, valid):
        attend(*given, tiles, key_mask=mask, backend="flex")

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
        [(False, False, False, torch.float32), (True, True, True, torch.float32), (True, False, False, torch.bfloat16)],
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
            check_output(q, k, v[..., :40], with_masks(random_lists(4, 300, 300, 64, 32, pooled=False)))
        assert counters["stats"]["unique_graphs"] - before == 1

    def test_gradients_are_those_of_the_torch_backend(self):
        leaves = [x.requires_grad_() for x in qkv(*self.SHAPE, torch.float32)]
        tiles, seed = random_lists(4, 300, 300, 64, 32, pooled=False), torch.randn_like(leaves[0])
        outs = [attend(*leaves, tiles, backend=backend) for backend in ("flex", "torch")]
        assert all(map(torch.equal, *(torch.autograd.grad(out, leaves, seed) for out in outs)))


def test_more_shapes_than_dynamos_limit_stay_compiled(monkeypatch):
    """Past recompile_limit Dynamo raises or goes on eagerly, and the eager FlexAttention reads no lists."""
    traced = torch.compile(flex_backend._compilable, backend="eager", dynamic=False, fullgraph=True)
    monkeypatch.setattr(flex_backend, "_compiled", lambda: traced)
    monkeypatch.setattr(flex_backend, "missing_requirement", lambda device_type: None)
    before = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(recompile_limit=1):
        for tiles in (random_lists(1, 33, 33, 16, 16), full(34)):
            check_output(*qkv(1, 1, 1, tiles.num_q, tiles.num_q, 16, torch.float32), tiles)
    assert counters["stats"]["unique_graphs"] - before == 2


def check_output(q, k, v, tiles, **arguments) -> None:
    """The output against the reference in float64 on the same inputs."""
    wide = {name: x.double() if name == "head_scale" else x for name, x in arguments.items()}
    truth = attend(q.double(), k.double(), v.double(), tiles, backend="reference", **wide)
    found, yardstick = (attend(q, k, v, tiles, backend=name, **arguments) for name in ("flex", "reference"))
    assert found.dtype == q.dtype
    assert_within_rounding(found, yardstick, truth, q.dtype)
