"""How tokens and heads are spread over processes: the numbers alone; processes run in test_context_parallel."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import wan_tiny
from diffusers.models import attention_dispatch
from dit_accel_pipelines import ADAPTERS

import dit_accel
from dit_accel.attachment import forward
from dit_accel.attachment.parallel import naming_lost
from dit_accel.attachment.shards import Ulysses, shards_of
from dit_accel.errors import ConfigError, ProcessLost
from dit_accel.methods.guidance.weaker import parallel_to_share
from dit_accel.plan.heads import HeadShare

CPU = torch.device("cpu")


def adapter(name: str):
    return next(one for one in ADAPTERS if one.name == name)


def config(degree: int = 1, rank: int = 0, anything: bool = False) -> SimpleNamespace:
    mesh = SimpleNamespace(get_group=lambda: None)
    return SimpleNamespace(
        ring_degree=1, ulysses_degree=degree, ulysses_anything=anything, _ulysses_local_rank=rank, _ulysses_mesh=mesh
    )


def spread(name: str, grid, degree: int, rank: int = 0, text: int | None = None) -> Ulysses:
    return shards_of(config(degree, rank, anything=True), adapter(name), grid, text, CPU)


def test_one_stream_is_gathered_in_its_own_order():
    found = spread("wan", (5, 2, 2, 0, 0), 4, rank=1)
    assert (found.counts, found.local, found.gathered, found.positions) == ((5, 5, 5, 5), 5, None, None)


@pytest.mark.parametrize(("name", "grid", "degree", "text", "gathered", "counts"), [
    # two text tokens, four of the image, two of a reference that joined the image's stream
    ("flux", (1, 2, 2, 2, 2), 2, None, [0, 2, 3, 4, 1, 5, 6, 7], (4, 4)),
    # one text token, then one of a reference, which FLUX.2's transformer takes with its four of the picture
    ("flux2", (1, 2, 2, 2, 0), 2, 1, [0, 1, 2, 3, 4, 5], (4, 2)),
    ("hunyuan-video", (1, 2, 2, 0, 2), 2, None, [0, 1, 4, 2, 3, 5], (3, 3)),
    ("flux", (1, 2, 2, 4, 0), 3, None, [0, 1, 4, 5, 2, 6, 3, 7], (4, 2, 2)),
])  # fmt: skip
def test_each_stream_is_split_apart(name, grid, degree, text, gathered, counts):
    found = spread(name, grid, degree, text=text)
    assert (found.gathered.tolist(), found.counts) == (gathered, counts)
    assert found.positions[found.gathered].tolist() == list(range(len(gathered)))


@pytest.mark.parametrize(("heads", "degree", "runs"), [(4, 2, [2, 2]), (5, 3, [2, 2, 1]), (7, 4, [2, 2, 2, 1])])
def test_heads_are_shared_in_runs(heads, degree, runs):
    shares = [spread("wan", (degree, 1, 1, 0, 0), degree, rank).share(heads) for rank in range(degree)]
    assert [share.count for share in shares] == runs
    assert [head for share in shares for head in range(heads)[share.own]] == list(range(heads))


def test_masks_over_all_keys_are_brought_into_the_order_of_the_exchange():
    found = spread("flux", (1, 2, 2, 2, 0), 2)
    mask = torch.tensor([[True, False, True, True, True, False]])
    assert found.whole_mask(mask) is mask
    assert found.gathered_mask(mask).tolist() == [[True, True, True, False, True, False]]
    assert found.gathered_mask(mask[:, :3]).shape == (1, 3)
    assert found.whole_mask(None) is None


def test_masks_that_are_split_as_the_tokens_are_come_back_in_the_order_of_the_model(monkeypatch):
    whole = torch.tensor([[True, False, False, True, True, False]])
    parts = whole[:, [0, 2, 3, 1, 4, 5]].split(3, -1)  # each process has a token of text and two of the picture
    monkeypatch.setattr(HeadShare, "joined", lambda self, x, dim: torch.cat(parts, dim))
    found = spread("flux", (1, 2, 2, 2, 0), 2)
    assert torch.equal(found.whole_mask(parts[0]), whole)
    parts = whole.split(3, -1)  # one stream is in the order of the model already
    assert torch.equal(spread("wan", (3, 1, 2, 0, 0), 2).whole_mask(parts[0]), whole)


def test_masks_that_pair_queries_with_keys_are_refused():
    found = spread("flux", (1, 2, 2, 2, 0), 2)
    with pytest.raises(ConfigError, match=r"\[1, 1, 3, 3\].*3 of 6 tokens"):
        found.whole_mask(torch.ones(1, 1, 3, 3, dtype=torch.bool))


@pytest.mark.parametrize("kind", ["ulysses", "ring"])
def test_tokens_that_are_not_split_evenly_are_refused(kind):
    names = {f"{kind}_degree": 2, f"_{kind}_local_rank": 0, f"_{kind}_mesh": SimpleNamespace(get_group=lambda: None)}
    parallel = SimpleNamespace(**{"ring_degree": 1, "ulysses_degree": 1, "ulysses_anything": True, **names})
    found = shards_of(parallel, adapter("flux"), (1, 2, 2, 2, 0), 2, CPU)
    with pytest.raises(ConfigError, match=r"4 tokens.*rank 0 of 2.*6.*3"):
        found.gather(torch.zeros(1, 4, 2, 8))


def test_heads_that_cannot_be_shared_evenly_are_refused_before_the_exchange():
    found = shards_of(config(2), adapter("wan"), (2, 2, 2, 0, 0), None, CPU)
    with pytest.raises(ConfigError, match=r"ulysses_degree = 2.*3 heads"):
        found.gather(torch.zeros(1, 4, 3, 8))


def agreements(monkeypatch):
    """A tiny transformer that believes to run under context parallelism, and the latents that were compared."""
    compared, parallel = [], config()
    monkeypatch.setattr(forward, "context_parallel", lambda transformer: parallel)
    monkeypatch.setattr(forward, "require_agreement", lambda *given: compared.append(list(given[-1].shape)))
    return wan_tiny.tiny_transformer(), compared


def test_processes_compare_what_they_run_once_a_run_and_in_training_once_a_shape(monkeypatch):
    transformer, compared = agreements(monkeypatch)
    text = torch.randn(1, 6, 64)

    def run(frames, timestep):
        transformer(torch.randn(1, 12, frames, 8, 8), torch.tensor([timestep]), text, return_dict=False)

    with dit_accel.attach(transformer, dit_accel.LiteAttention(block_size=16, dense_steps=0)):
        for _ in range(2):
            with torch.no_grad():
                for step in range(3):
                    run(5, 900.0 - 100 * step)
        assert len(compared) == 2
        compared.clear()
        transformer.train()
        for frames in (5, 5, 3, 5, 3):
            run(frames, float(torch.rand(())) * 1000)
        assert compared == [[1, 12, 5, 8, 8], [1, 12, 3, 8, 8]]
        transformer.eval()
        with torch.no_grad():
            run(5, 900.0)
        assert len(compared) == 3


def test_errors_of_the_communication_are_named_and_others_left():
    state, parallel = SimpleNamespace(name="transformer"), SimpleNamespace(ulysses_degree=2, ring_degree=1)
    lost = "2 processes"
    with pytest.raises(ProcessLost, match=lost), naming_lost(state, parallel):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer")
    with pytest.raises(RuntimeError, match="mat1 and mat2"), naming_lost(state, parallel):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="gloo") as raised, naming_lost(state, None):
        raise RuntimeError("gloo: Connection closed by peer")
    assert type(raised.value) is RuntimeError


@pytest.mark.parametrize(("name", "grid"), [("flux", (1, 2, 2, 2, 0)), ("wan", (3, 1, 2, 0, 0))])
def test_an_exchange_is_of_tokens_for_heads_and_in_the_model_s_order(monkeypatch, name, grid):
    found, exchanged = replace(spread(name, grid, 2), anything=False), []

    def exchange(group, x, *dims):
        exchanged.append((x, dims))
        return whole if not dims else x[:, :3]

    monkeypatch.setattr(attention_dispatch.SeqAllToAllDim, "apply", exchange)
    whole = torch.arange(6.0).reshape(1, 6, 1, 1).expand(1, 6, 2, 1)
    order = [0, 1, 2, 3, 4, 5] if found.gathered is None else found.gathered.tolist()
    back = found.gather(torch.zeros(1, 3, 4, 1))
    assert back[0, :, 0, 0].tolist() == [order.index(token) for token in range(6)]
    found.scatter(back, 4)
    assert torch.equal(exchanged[1][0], whole)
    assert exchanged[1][1] == (1, 2)


def test_shards_are_made_once_a_shape(monkeypatch):
    transformer, _ = agreements(monkeypatch)
    made, shards_of = [], forward.shards_of
    monkeypatch.setattr(forward, "shards_of", lambda *given: made.append(given[2]) or shards_of(*given))
    with dit_accel.attach(transformer, dit_accel.LiteAttention(block_size=16, dense_steps=0)), torch.no_grad():
        for frames in (5, 5, 3, 3):
            transformer(torch.randn(1, 12, frames, 8, 8), torch.tensor([500]), torch.zeros(1, 6, 64), return_dict=False)
    assert [grid[0] for grid in made] == [5, 3]


def test_weaker_models_that_diffusers_cannot_split_as_the_model_is_run_whole(monkeypatch):
    transformer, weak = wan_tiny.tiny_transformer(), wan_tiny.tiny_transformer(1)
    assert parallel_to_share(transformer, weak, {}) is None
    parallel = transformer._parallel_config = SimpleNamespace(context_parallel_config=SimpleNamespace(ulysses_degree=2))
    assert parallel_to_share(transformer, weak, {"encoder_attention_mask": None}) is parallel
    assert parallel_to_share(transformer, weak, {"encoder_attention_mask": torch.ones(1, 6)}) is None
    for changes in ({"num_attention_heads": 3}, {"patch_size": (1, 4, 4)}):
        assert parallel_to_share(transformer, wan_tiny.tiny_transformer(1, **changes), {}) is None
    assert parallel_to_share(transformer, torch.nn.Identity(), {}) is None
    weak.blocks[0].attn1.processor._attention_backend = "flash"
    assert parallel_to_share(transformer, weak, {}) is None
    weak.blocks[0].attn1.processor._attention_backend = None
    monkeypatch.setattr(type(weak), "_cp_plan", None)
    assert parallel_to_share(transformer, weak, {}) is None
