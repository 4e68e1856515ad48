"""How tokens and heads are spread over processes, and what processes compare: the numbers, with none but this one."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import wan_tiny
from diffusers.models import attention_dispatch
from dit_accel_pipelines import ADAPTERS

import dit_accel
from dit_accel.attachment import forward
from dit_accel.attachment.parallel import naming_lost, require_agreement, require_parallel
from dit_accel.attachment.shards import Ring, Ulysses, shards_of
from dit_accel.errors import ConfigError, ProcessLost
from dit_accel.methods.guidance.weaker import parallel_to_share
from dit_accel.plan.heads import HeadShare

CPU = torch.device("cpu")
MESH = SimpleNamespace(get_group=lambda: None)
FLUX = (1, 2, 2, 2, 0)
"""A grid of two tokens of text and four of a picture."""


def adapter(name: str):
    return next(one for one in ADAPTERS if one.name == name)


def config(degree: int = 1, rank: int = 0, anything: bool = False, ring: int = 1) -> SimpleNamespace:
    return SimpleNamespace(
        ring_degree=ring, ulysses_degree=degree, ulysses_anything=anything, _ulysses_local_rank=rank,
        _ulysses_mesh=MESH, _ring_local_rank=rank, _ring_mesh=MESH, _flattened_mesh=MESH,
    )  # fmt: skip


def spread(name: str, grid, degree: int, rank: int = 0, text: int | None = None) -> Ulysses:
    return shards_of(config(degree, rank, anything=True), adapter(name), grid, text, CPU)


def test_one_stream_is_gathered_in_its_own_order():
    shards = spread("wan", (5, 2, 2, 0, 0), 4, rank=1)
    assert (shards.counts, shards.local, shards.gathered, shards.positions) == ((5, 5, 5, 5), 5, None, None)
    assert spread("flux", (1, 2, 2, 0, 0), 2).gathered is None


@pytest.mark.parametrize(("name", "grid", "degree", "text", "gathered", "counts"), [
    # two text tokens, four of the image, two of a reference that joined the image's stream
    ("flux", (1, 2, 2, 2, 2), 2, None, [0, 2, 3, 4, 1, 5, 6, 7], (4, 4)),
    # one text token, then one of a reference, which FLUX.2's transformer takes with its four of the picture
    ("flux2", FLUX, 2, 1, [0, 1, 2, 3, 4, 5], (4, 2)),
    ("hunyuan-video", (1, 2, 2, 0, 2), 2, None, [0, 1, 4, 2, 3, 5], (3, 3)),
    ("flux", (1, 2, 2, 4, 0), 3, None, [0, 1, 4, 5, 2, 6, 3, 7], (4, 2, 2)),
])  # fmt: skip
def test_each_stream_is_split_apart(name, grid, degree, text, gathered, counts):
    shards = spread(name, grid, degree, text=text)
    assert (shards.gathered.tolist(), shards.counts) == (gathered, counts)
    assert shards.positions[shards.gathered].tolist() == list(range(len(gathered)))


@pytest.mark.parametrize(("heads", "degree", "runs"), [(4, 2, [2, 2]), (5, 3, [2, 2, 1]), (7, 4, [2, 2, 2, 1])])
def test_heads_are_shared_in_runs(heads, degree, runs):
    shares = [spread("wan", (degree, 1, 1, 0, 0), degree, rank).share(heads) for rank in range(degree)]
    assert [share.count for share in shares] == runs
    assert [head for share in shares for head in range(heads)[share.own]] == list(range(heads))


def test_masks_follow_the_order_of_the_exchange_or_come_back_in_the_model_s(monkeypatch):
    shards = spread("flux", FLUX, 2)
    mask = torch.tensor([[True, False, True, True, True, False]])
    assert shards.whole_mask(mask) is mask
    assert shards.gathered_mask(mask).tolist() == [[True, True, True, False, True, False]]
    assert shards.gathered_mask(mask[:, :3]).shape == (1, 3)
    assert shards.whole_mask(None) is None
    with pytest.raises(ConfigError, match=r"\[1, 1, 3, 3\].*3 of 6 tokens"):
        shards.whole_mask(torch.ones(1, 1, 3, 3, dtype=torch.bool))

    def joined(share, x, dim):
        assert (share.start, share.count, share.total, x.shape[-1]) == (0, 4, 12, 4)
        return torch.cat([torch.nn.functional.pad(part, (0, 4 - part.shape[-1])) for part in parts], dim)

    monkeypatch.setattr(HeadShare, "joined", joined)
    whole = torch.tensor([True, False, False, True, True, False, True, True]).reshape(1, 1, 1, 8)
    parts = whole[..., [0, 1, 4, 5, 2, 6, 3, 7]].split((4, 2, 2), -1)  # each process has text and picture
    assert torch.equal(spread("flux", (1, 2, 2, 4, 0), 3, rank=1).whole_mask(parts[1]), whole)
    parts = whole[0, 0].split((4, 4), -1)  # one stream is in the order of the model already
    monkeypatch.setattr(HeadShare, "joined", lambda share, x, dim: torch.cat(parts, dim))
    assert torch.equal(spread("wan", (2, 2, 2, 0, 0), 2).whole_mask(parts[0]), whole[0, 0])


def test_tokens_that_are_not_split_evenly_are_refused():
    for parallel in (config(2, anything=True), config(ring=2)):
        with pytest.raises(ConfigError, match=r"4 tokens.*rank 0 of 2.*6.*3"):
            shards_of(parallel, adapter("flux"), FLUX, 2, CPU).gather(torch.zeros(1, 4, 2, 8))


def state_of(heads: int = 4) -> SimpleNamespace:
    layer = SimpleNamespace(index=0, heads=heads, processor=SimpleNamespace(_parallel_config=None))
    wan = SimpleNamespace(name="wan", split_text=False)
    return SimpleNamespace(name="transformer", branch="cond", layers=[layer], adapter=wan)


METHOD = SimpleNamespace(name="radial", objects=False, by_place=True, settings=SimpleNamespace(to_dict=dict))
ENGINE = SimpleNamespace(handlers=(METHOD,), attention=(METHOD,), backend="torch", dense="user")


def engine_of(**changes) -> SimpleNamespace:
    method = SimpleNamespace(**{**vars(METHOD), **changes})
    return SimpleNamespace(handlers=(method,), attention=(method,))


def test_what_processes_cannot_share_is_refused():
    looking, silent, foreign = engine_of(by_place=False), state_of(), state_of()
    silent.adapter.split_text, foreign.layers[0].processor = None, METHOD
    for engine, state, parallel, text in (
        (engine_of(objects=True), state_of(), config(), r"^radial is.*EasyCache"),
        (looking, state_of(), config(ring=2), r"^radial: ring_degree = 2.*ulysses_degree="),
        (ENGINE, state_of(), config(2, ring=2), r"ring_degree = 2.*ulysses_degree = 2"),
        (ENGINE, silent, config(2), r"'wan'.*split_text"),
        (ENGINE, foreign, config(2), r"SimpleNamespace of transformer.*parallelism"),
        (ENGINE, state_of(5), config(2), r"ulysses_degree = 2.*5 heads"),
        (ENGINE, state_of(6), config(4, anything=True), r"ulysses_degree = 4.*none.*6 heads"),
    ):
        with pytest.raises(ConfigError, match=text):
            require_parallel(engine, state, parallel)
    for parallel in (config(2), config(ring=2), config()):
        require_parallel(ENGINE, state_of(), parallel)
    require_parallel(looking, state_of(7), config(4, anything=True))
    require_parallel(SimpleNamespace(handlers=(), attention=()), silent, config(2))
    shards = shards_of(config(2), adapter("wan"), (2, 2, 2, 0, 0), None, CPU)
    with pytest.raises(ConfigError, match=r"ulysses_degree = 2.*3 heads"):
        shards.gather(torch.zeros(1, 4, 3, 8))


@pytest.mark.parametrize(
    ("what", "other"),
    [(None, None), ("backend", "triton"), ("step_index", 1), ("branch", "uncond"), ("methods", {}), ("layers", [1]),
     ("latents", -7)],
)  # fmt: skip
def test_processes_that_run_something_else_are_refused(monkeypatch, what, other):
    """The second of two processes says what the first does, but for a change."""
    compared, latents = [], -torch.arange(64.0).reshape(1, 4, 4, 4)

    def gather(out, own, group=None):
        compared.append(own)
        values, noise = own
        changed = {what: other} if what not in (None, "latents") else {}
        out[:] = [own, ({**values, **changed}, [noise[0] + 6, *noise[1:-1], noise[-1] - 7 * (what == "latents")])]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    denoising = SimpleNamespace(engine=ENGINE, num_inference_steps=5, step_index=0)
    if what:
        with pytest.raises(ConfigError, match=rf"{what}.*rank 1"):
            require_agreement(denoising, state_of(), config(2), latents)
    else:
        require_agreement(denoising, state_of(), config(2), latents)
    ((values, noise),) = compared
    assert values["latents"] == "torch.float32 [1, 4, 4, 4]"
    assert [*noise[:2], noise[-1]] == [0, -4, -63]  # sixteen, from the first number to the last


def test_a_ring_gathers_all_tokens_in_the_model_s_order(monkeypatch):
    whole = torch.arange(5 * 2 * 3.0).reshape(1, 5, 2, 3)
    for order in (torch.tensor([0, 2, 4, 1, 3]), None):  # of two processes, of which the second has a token less
        split = (whole if order is None else whole[:, order]).split((3, 2), 1)
        for rank in range(2):

            def gather(parts, sent, group=None, split=split, rank=rank):
                assert sent.is_contiguous(), "what is sent must be"
                parts[0].copy_(split[0]), parts[1][:, :2].copy_(split[1]), parts[rank].copy_(sent)

            monkeypatch.setattr(dist, "all_gather", gather)
            back = None if order is None else order.argsort()
            ring = Ring(group=None, rank=rank, counts=(3, 2), gathered=order, positions=back)
            assert torch.equal(ring.gather(split[rank].mT.contiguous().mT), whole)
    with pytest.raises(ConfigError):
        ring.gather(whole)
    for name, grid, rows in (("flux", FLUX, [1, 4, 5]), ("wan", (3, 1, 2, 0, 0), [3, 4, 5])):
        assert shards_of(config(ring=2, rank=1), adapter(name), grid, None, CPU).rows.tolist() == rows


def test_processes_compare_once_a_run_and_in_training_once_a_shape_of_which_shards_are_made(monkeypatch):
    transformer, compared, parallel = wan_tiny.tiny_transformer(num_layers=1), [], config()
    monkeypatch.setattr(forward, "context_parallel", lambda transformer: parallel)
    monkeypatch.setattr(forward, "require_agreement", lambda *given: compared.append(list(given[-1].shape)))
    made, shards_of, text = [], forward.shards_of, torch.randn(1, 6, 64)
    monkeypatch.setattr(forward, "shards_of", lambda *given: made.append(given[2][0]) or shards_of(*given))

    def run(frames, timestep):
        transformer(torch.randn(1, 12, frames, 8, 8), torch.tensor([timestep]), text, return_dict=False)

    with dit_accel.attach(transformer, dit_accel.LiteAttention(block_size=16, dense_steps=0)):
        with torch.no_grad():
            for step in (0, 1, 0, 1):
                run(5, 900.0 - 100 * step)
        assert (len(compared), made) == (2, [5])
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
    with pytest.raises(ProcessLost, match="2 processes"), naming_lost(state, parallel):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer")
    for config_, text in ((parallel, "mat1 and mat2 differ"), (None, "gloo: Connection closed by peer")):
        with pytest.raises(RuntimeError, match=text[:4]) as raised, naming_lost(state, config_):
            raise RuntimeError(text)
        assert type(raised.value) is RuntimeError


@pytest.mark.parametrize(("name", "grid"), [("flux", FLUX), ("wan", (3, 1, 2, 0, 0))])
def test_an_exchange_is_of_tokens_for_heads_and_in_the_model_s_order(monkeypatch, name, grid):
    shards, exchanged = replace(spread(name, grid, 2), anything=False), []

    def exchange(group, x, *dims):
        exchanged.append((x, dims))
        return whole if not dims else x[:, :3]

    monkeypatch.setattr(attention_dispatch.SeqAllToAllDim, "apply", exchange)
    whole = torch.arange(6.0).reshape(1, 6, 1, 1).expand(1, 6, 2, 1)
    order = [0, 1, 2, 3, 4, 5] if shards.gathered is None else shards.gathered.tolist()
    own = torch.zeros(1, 3, 4, 1, requires_grad=True)
    back, *_ = shards.gather_call(own, own, own)
    with pytest.raises(ConfigError, match="ulysses_anything"):
        replace(shards, anything=True).gather_call(own, own, own)
    assert back[0, :, 0, 0].tolist() == [order.index(token) for token in range(6)]
    shards.scatter(back, 4)
    assert torch.equal(exchanged[-1][0], whole)
    assert exchanged[-1][1] == (1, 2)


def test_weaker_models_that_diffusers_cannot_split_as_the_model_is_run_whole(monkeypatch):
    transformer, weak = (wan_tiny.tiny_transformer(seed, num_layers=1) for seed in (0, 1))
    assert parallel_to_share(transformer, weak, {}) is None
    parallel = transformer._parallel_config = SimpleNamespace(context_parallel_config=SimpleNamespace(ulysses_degree=2))
    assert parallel_to_share(transformer, weak, {"encoder_attention_mask": None}) is parallel
    assert parallel_to_share(transformer, weak, {"encoder_attention_mask": torch.ones(1, 6)}) is None
    for changes in ({"num_attention_heads": 3}, {"patch_size": (1, 4, 4)}):
        assert parallel_to_share(transformer, wan_tiny.tiny_transformer(1, num_layers=1, **changes), {}) is None
    assert parallel_to_share(transformer, torch.nn.Identity(), {}) is None
    for backend, cut in (("flash", False), (None, True)):
        weak.blocks[0].attn1.processor._attention_backend = backend
        if cut:
            monkeypatch.setattr(type(weak), "_cp_plan", None)
        assert parallel_to_share(transformer, weak, {}) is None
