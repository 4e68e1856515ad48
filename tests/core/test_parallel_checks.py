"""What processes compare and what is refused under context parallelism, with the others' part played by the test."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from dit_accel import ConfigError
from dit_accel.attachment.parallel import require_agreement, require_parallel
from dit_accel.attachment.shards import Ring

MESH = SimpleNamespace(get_group=lambda: None)


def state_of(heads: int = 4) -> SimpleNamespace:
    layer = SimpleNamespace(index=0, heads=heads, processor=SimpleNamespace(_parallel_config=None))
    adapter = SimpleNamespace(name="wan", split_text=False)
    return SimpleNamespace(name="transformer", branch="cond", layers=[layer], adapter=adapter)


def engine_of(*handlers: SimpleNamespace, backend: str = "torch") -> SimpleNamespace:
    return SimpleNamespace(handlers=handlers, attention=handlers, backend=backend, dense="user")


def denoising_of(*handlers: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(engine=engine_of(*handlers), num_inference_steps=5, step_index=0)


def method(**options) -> SimpleNamespace:
    settings = SimpleNamespace(to_dict=lambda: options)
    return SimpleNamespace(name="radial", objects=False, by_place=True, settings=settings)


def played(monkeypatch, change=lambda mine, noise: (mine, noise)) -> None:
    """Let the second of two processes say what the first does, but for a change."""

    def gather(out, mine, group=None):
        out[:] = [mine, change(*mine)]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)


CONFIG = SimpleNamespace(ring_degree=1, ulysses_degree=2, ulysses_anything=False, _flattened_mesh=MESH)


LATENTS = torch.arange(64.0).reshape(1, 4, 4, 4)


def test_processes_that_begin_alike_agree(monkeypatch):
    compared = []
    played(monkeypatch, lambda mine, noise: compared.append((mine, noise)) or (dict(mine), [x + 1e-6 for x in noise]))
    require_agreement(denoising_of(method()), state_of(), CONFIG, LATENTS)
    ((mine, noise),) = compared
    assert mine["latents"] == "torch.float32 [1, 4, 4, 4]"
    assert (noise[0], noise[-1]) == (0, 63)  # from the first number to the last


@pytest.mark.parametrize(
    ("what", "other"),
    [("backend", "triton"), ("step_index", 1), ("branch", "uncond"), ("methods", {}), ("layers", [1]), ("latents", 9)],
)
def test_processes_that_run_something_else_are_refused(monkeypatch, what, other):
    moved = other if what == "latents" else 0
    changed = {} if what == "latents" else {what: other}
    played(monkeypatch, lambda mine, noise: ({**mine, **changed}, [*noise[:-1], noise[-1] + moved]))
    with pytest.raises(ConfigError, match=rf"{what}.*rank 1"):
        require_agreement(denoising_of(method()), state_of(), CONFIG, LATENTS)


def test_ring_attention_and_ulysses_are_each_right_and_not_both():
    for ring, ulysses in ((2, 1), (1, 2), (1, 1)):
        require_parallel(engine_of(method()), state_of(), SimpleNamespace(
            ring_degree=ring, ulysses_degree=ulysses, ulysses_anything=False))  # fmt: skip
    with pytest.raises(ConfigError, match=r"ring_degree = 2.*ulysses_degree = 2"):
        require_parallel(
            engine_of(method()), state_of(), SimpleNamespace(ring_degree=2, ulysses_degree=2, ulysses_anything=False)
        )


@pytest.mark.parametrize(("heads", "degree", "anything", "text"), [
    (5, 2, False, r"ulysses_degree = 2.*5 heads"), (4, 5, True, r"ulysses_degree = 5.*none.*4 heads"),
])  # fmt: skip
def test_heads_that_cannot_be_shared_are_refused(heads, degree, anything, text):
    config = SimpleNamespace(ring_degree=1, ulysses_degree=degree, ulysses_anything=anything)
    with pytest.raises(ConfigError, match=text):
        require_parallel(engine_of(method()), state_of(heads), config)
    require_parallel(engine_of(method()), state_of(10), config)


def test_a_ring_gathers_all_tokens_in_the_model_s_order(monkeypatch):
    whole = torch.arange(5 * 2 * 3.0).reshape(1, 5, 2, 3)
    split = whole[:, [0, 2, 4]], whole[:, [1, 3]]  # of two processes, of which the second has a token less

    def gather(parts, sent, group=None):
        assert sent.is_contiguous(), "what is sent must be"
        for part, own in zip(parts, split, strict=True):
            part.copy_(torch.nn.functional.pad(own, (0, 0, 0, 0, 0, sent.shape[1] - own.shape[1])))

    monkeypatch.setattr(dist, "all_gather", gather)
    order = torch.tensor([0, 2, 4, 1, 3])
    for own, rank in ((split[0], 0), (split[1], 1)):
        rows, back = order.split((3, 2))[rank], order.argsort()
        ring = Ring(group=None, rank=rank, counts=(3, 2), gathered=order, positions=back, rows=rows)
        assert torch.equal(ring.gather(own.mT.contiguous().mT), whole)
    with pytest.raises(ConfigError):
        ring.gather(whole)
