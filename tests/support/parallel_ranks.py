"""What one of several processes runs to test context parallelism; here, so that a process that is started finds it."""

import copy
import datetime
import multiprocessing
import os
import signal
import socket
import time
import traceback
from typing import Any
from unittest import mock

import diffusers
import tiny_models
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers.models import attention_dispatch
from dit_accel_pipelines.processes.parallel import enable_ulysses
from tiny_models import LTX, MOCHI

import dit_accel

TEXT = 8
PRELOADED = [
    "torch.multiprocessing", "diffusers.models.transformers", "diffusers.pipelines.flux.pipeline_flux",
    "dit_accel.attachment.attachment", "dit_accel_pipelines.generation.generate", "dit_accel_assets.clips",
    "dit_accel_pipelines.finetuning.run", "diffusers.pipelines.wan.pipeline_wan", "diffusers.training_utils", "peft",
]  # fmt: skip
"""What one process imports for all that are started, which are its copies."""


MODELS = {
    "wan": ("wan", 0), "flux": ("flux", 0), "hunyuan-video": ("hunyuan-video", 0), "flux2": ("flux2", 0),
    "flux2 with references": ("flux2", 1), "qwen-image": ("qwen-image", 0), "qwen-image-edit": ("qwen-image", 1),
    "chronoedit": ("wan", 3), "minimax-h3": ("minimax-h3", 0),
}  # fmt: skip
"""Name of a model -> its family and number among the tiny models."""


def shared_evenly(name: str, text: int) -> dict[str, Any]:
    """Return inputs whose tokens four processes can share evenly, for models that differ from those of the table."""
    mask, words = (torch.arange(text)[None] < text - 3).long(), torch.randn(1, text, 16)
    return {
        "wan": dict(hidden_states=torch.randn(1, 12, 5, 8, 8)),
        "flux": dict(encoder_hidden_states=words, txt_ids=torch.zeros(text, 3)),
        "hunyuan-video": dict(
            hidden_states=torch.randn(1, 4, 5, 8, 8), encoder_hidden_states=words, encoder_attention_mask=mask
        ),
    }.get(name, {})


def build(name: str, heads: int = 4, text: int = TEXT) -> tuple[Any, dict[str, Any]]:
    """A tiny model that attends sharply, and what it is given."""
    torch.manual_seed(0)
    family, number = MODELS[name]
    tiny, changed = tiny_models.MODELS[family][number], shared_evenly(name, text)
    transformer = tiny.transformer(**{**tiny.config, "num_attention_heads": heads})
    for path, weight in transformer.named_parameters():
        if path.endswith(("norm_q.weight", "norm_k.weight")):
            weight.data.mul_(3.0)
    inputs = {**tiny.inputs(1), **changed}
    if changed:
        del inputs["timestep"]
    return transformer.eval(), inputs


def denoise(transformer: Any, inputs: dict[str, Any], steps: int = 3, guided: bool = True) -> torch.Tensor:
    """Return the latents after some steps that the context tells, with guidance in two calls."""
    x, text = inputs["hidden_states"], inputs["encoder_hidden_states"]
    with torch.no_grad():
        for step in range(steps):
            found = []
            for branch, prompt in (("cond", text), ("uncond", text.flip(-1)))[: 1 + guided]:
                with transformer.cache_context(branch, step_index=step, num_inference_steps=steps, sigma=1 - step / 8):
                    time = inputs.get("timestep", torch.full((1,), 1000.0)) * (1 - step / 10)
                    given = {**inputs, "hidden_states": x, "encoder_hidden_states": prompt, "timestep": time}
                    found.append(transformer(**given, return_dict=False)[0])
            x = x - 0.3 * sum(found)
    return x


def run(transformer: Any, inputs: dict[str, Any], methods: tuple[Any, ...], **options: Any) -> torch.Tensor:
    """Return the latents of a run with methods."""
    with dit_accel.attach(transformer, *methods, preset="none"):
        return denoise(transformer, inputs, **options)


def both(world: int, name: str = "wan", **sizes: int) -> tuple[Any, Any, dict[str, Any]]:
    """Return a tiny model of one process, the same one split over all of them, and what both are given."""
    transformer, inputs = build(name, **sizes)
    spread = copy.deepcopy(transformer)
    enable_ulysses(spread, world)
    return transformer, spread, inputs


def result_of(work: Any, *given: Any, **options: Any) -> Any:
    """Return what something gives, or in words the error that it raises."""
    try:
        return work(*given, **options)
    except Exception as error:
        return told(error)


def enable(transformer: Any, **options: Any) -> None:
    """Enable context parallelism as diffusers does, on a machine of which every process has an accelerator."""
    config = diffusers.ContextParallelConfig(**options)
    with mock.patch.object(torch.accelerator, "device_count", return_value=dist.get_world_size()):
        transformer.enable_parallelism(config=config)


def start(rank: int, world: int, port: int, work: Any, found: Any, seconds: float, given: tuple[Any, ...]) -> None:
    """Join the group, unless ``work`` does, and put under the rank what it gives, or the error that it raises."""
    torch.set_num_threads(1)
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": world}
    launched |= {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in launched.items()})
    if seconds:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=seconds))
    found[rank] = result = result_of(work, rank, world, *given)
    if seconds and not isinstance(result, str):
        dist.barrier()
    if seconds:
        dist.destroy_process_group()


def processes(world: int, work: Any, *given: Any, seconds: float = 60) -> dict[int, Any]:
    """Return rank -> what ``work(rank, world, *given)`` gave on it, or its error in words.

    The group's timeout is ``seconds``; with 0 they are in none, as a launcher leaves them.
    """
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        port = asked.getsockname()[1]
    multiprocessing.set_forkserver_preload(PRELOADED)
    with multiprocessing.get_context("forkserver").Manager() as manager:
        found = manager.dict()
        spawned = mp.start_processes(
            start, (world, port, work, found, seconds, given), nprocs=world, join=False, start_method="forkserver"
        )
        deadline = time.monotonic() + 900  # to start takes its time beside other work
        for process in spawned.processes:
            process.join(max(0, deadline - time.monotonic()))
        alive = [rank for rank, process in enumerate(spawned.processes) if process.is_alive()]
        for rank in alive:
            spawned.processes[rank].kill()
        assert not alive, f"ranks {alive} hang"
        return dict(found)


def compare(rank: int, world: int, model: str, cases: dict[str, tuple[Any, ...]], sizes: Any, options: Any) -> Any:
    """Return case -> (how far the processes' output lies from one process's, how far that lies from dense).

    With a ``ring_degree`` among the options they are a ring, and whatever stays dense is told its log-sum-exp.
    """
    transformer, inputs = build(model, **sizes)
    cases = {name: _complete(methods, transformer, inputs) for name, methods in cases.items()}
    spread = copy.deepcopy(transformer)
    if "ring_degree" in options:
        attention_dispatch._native_attention_forward_op = with_lse
        enable(spread, **options)
    else:
        enable_ulysses(spread, world, **options)
    guided = world == 2  # more processes tell of more heads and tokens, and no more of branches
    plain = denoise(transformer, inputs, guided=guided)
    share, shares = {}, [None] * world  # what one process gives is the same on all: each makes some of it
    for name in list(cases)[rank::world]:
        share[name] = run(transformer, inputs, cases[name], guided=guided)
    dist.all_gather_object(shares, share)
    alone = {name: one for part in shares for name, one in part.items()}

    def apart_of(name: str) -> tuple[float, float]:
        return apart(run(spread, inputs, cases[name], guided=guided), alone[name]), apart(alone[name], plain)

    return {name: result_of(apart_of, name) for name in cases}


def compare_each(rank: int, world: int, models: tuple[str, ...], cases: dict[str, tuple[Any, ...]]) -> Any:
    """Return "model: case" -> what `compare` does, of several models."""
    found = {model: compare(rank, world, model, cases, {}, {}) for model in models}
    return {f"{model}: {name}": one for model, results in found.items() for name, one in results.items()}


def compiled(rank: int, world: int, cases: dict[str, tuple[Any, ...]], options: Any) -> Any:
    """Return case -> how far compiled blocks' output lies from one process's, eager, and how many graphs were made."""
    from torch._dynamo.utils import counters

    def compared(methods: tuple[Any, ...]) -> tuple[float, int]:
        torch._dynamo.reset()
        counters.clear()
        transformer, spread, inputs = both(world)
        alone = run(transformer, inputs, methods)
        spread.compile_repeated_blocks(**options)
        return apart(run(spread, inputs, methods), alone), counters["stats"]["unique_graphs"]

    return {name: result_of(compared, methods) for name, methods in cases.items()}


def with_lse(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> Any:
    """Attend as diffusers' native backend, which refuses ring attention since SDPA tells no log-sum-exp."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    logits = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    return (logits.softmax(-1) @ v).transpose(1, 2), logits.logsumexp(-1).transpose(1, 2)


def _complete(methods: tuple[Any, ...], transformer: Any, inputs: dict[str, Any]) -> tuple[Any, ...]:
    """Return methods with a text, or a weaker model, for those that need it."""
    given = {
        "nag": lambda: dit_accel.NAG(negative_embeds=inputs["encoder_hidden_states"].roll(1, -1)),
        "autoguidance": lambda: dit_accel.AutoGuidance(scale=1.0, weak_transformer=weakened(transformer)),
    }
    return tuple(given[one.name]() if one.name in given else one for one in methods)


def weakened(transformer: Any) -> Any:
    """A copy of a transformer that predicts somewhat else."""
    weak = copy.deepcopy(transformer)
    with torch.no_grad():
        for parameter in weak.parameters():
            parameter.mul_(0.9)
    return weak


def weaker_models(rank: int, world: int) -> Any:
    """Return how a weaker model runs in a shared one, by its heads: (how far from one process, tokens, left behind).

    Tokens are those of its second block's input; what is left behind is its parallelism and hooks after detach.
    """
    found = {}
    transformer, spread, inputs = both(world)
    for heads in (4, 3):
        weak, tokens = build("wan", heads)[0] if heads == 3 else weakened(transformer), []
        method = dit_accel.AutoGuidance(scale=1.0, weak_transformer=weak)
        plain = denoise(weak, inputs)
        alone = run(transformer, inputs, (method,))
        handle = weak.blocks[1].register_forward_pre_hook(lambda _, given: tokens.append(given[0].shape[1]))  # noqa: B023
        together = run(spread, inputs, (method,))
        handle.remove()
        hooks = [name for one in weak.modules() for name in getattr(getattr(one, "_diffusers_hook", 0), "hooks", ())]
        told = [weak._parallel_config, *(block.attn1.processor._parallel_config for block in weak.blocks)]
        left = len(hooks) + sum(one is not None for one in told)
        found[heads] = apart(together, alone), sorted(set(tokens)), left, torch.equal(denoise(weak, inputs), plain)
    return found


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


def told(error: Exception) -> str:
    if os.environ.get("PARALLEL_TRACE"):
        traceback.print_exc()
    return f"{type(error).__name__}: {error}"


def attach_first(rank: int, world: int, nag: Any, methods: tuple[Any, ...]) -> Any:
    """Return how far processes and one lie apart: with a negative text, attached before, detached, in gradients."""
    transformer, inputs = build("wan")
    text, spread = torch.randn(1, 6, 64), copy.deepcopy(transformer)
    plain = denoise(transformer, inputs)
    alone = run(transformer, inputs, methods)
    gradient = gradient_of(transformer, inputs, methods[:1])
    attachment = dit_accel.attach(spread, *methods, preset="none")
    enable_ulysses(spread, world)
    together = denoise(spread, inputs)
    attachment.detach()
    dense = denoise(spread, inputs)
    far = [run(one, inputs, (nag(negative_embeds=text),)) for one in (transformer, spread)]
    shared = gradient_of(spread, inputs, methods[:1])
    dist.all_reduce(shared)
    return apart(*far), apart(together, alone), apart(dense, plain), apart(shared, gradient)


def observed(rank: int, world: int, methods: tuple[Any, ...]) -> Any:
    """Return how many calls an observer saw under ring attention, and how far these lie from one process's own rows."""
    transformer, inputs = build("wan")
    spread = copy.deepcopy(transformer)
    attention_dispatch._native_attention_forward_op = with_lse
    enable(spread, ring_degree=world)
    seen: list[list[Any]] = [[], []]
    for one, calls in zip((transformer, spread), seen, strict=True):
        with dit_accel.attach(one, *methods, preset="none") as attachment, attachment.observe(calls.append):
            denoise(one, inputs, steps=2)
    far = [apart(ours.out, whole.out[:, :, ours.rows]) for whole, ours in zip(*seen, strict=True)]
    return len(far), max(far), sorted({call.rows.numel() for call in seen[1]})


def trained(rank: int, world: int, methods: tuple[Any, ...]) -> int:
    """Return how often objects were gathered from all processes in four forwards of training."""
    transformer, inputs = build("wan")
    enable_ulysses(transformer, world)
    with (
        dit_accel.attach(transformer.train(), *methods, preset="none"),
        mock.patch.object(dist, "all_gather_object", wraps=dist.all_gather_object) as gathered,
    ):
        for step in range(4):
            transformer(**inputs, timestep=torch.full((1,), 100.0 * step), return_dict=False)
    return gathered.call_count


def gradient_of(transformer: Any, inputs: dict[str, Any], methods: tuple[Any, ...]) -> torch.Tensor:
    """The gradient of a layer's queries' weights; of processes, what each of them adds to it."""
    with dit_accel.attach(transformer, *methods, preset="none"):
        out = transformer(**inputs, timestep=torch.full((1,), 500.0), return_dict=False)[0]
        weight = transformer.blocks[1].attn1.to_q.weight
        return torch.autograd.grad(out.square().mean(), weight)[0]


def refused(rank: int, world: int) -> dict[str, str]:
    """Return case -> the error that this process raises."""
    lite = dit_accel.LiteAttention(block_size=16, dense_steps=0)

    def refusal(*methods: Any, heads: int = 4, split: Any = None, inputs: Any = None, **call: Any) -> str:
        transformer, own = build("wan", heads)
        enable(transformer, **(split or dict(ulysses_degree=world)))
        return result_of(run, transformer, {**own, **(inputs or {})}, methods, **call)

    undescribed = diffusers.LTXVideoTransformer3DModel(**LTX[0].config)
    enable(undescribed, ulysses_degree=world)
    ring = dict(ring_degree=world)
    other = dit_accel.LiteAttention(block_size=16, dense_steps=0, threshold=-3.0)
    return {
        "heads": refusal(lite, heads=3),
        "too few heads": refusal(lite, heads=1, split=dict(ulysses_degree=world, ulysses_anything=True)),
        "ring": refusal(lite, split=ring),
        "ring, of two": refusal(dit_accel.RadialAttention(), dit_accel.SolAttention(), split=ring),
        "undescribed": result_of(dit_accel.attach, undescribed, lite),
        "native": refusal(diffusers.FirstBlockCacheConfig()),
        "settings": refusal(other if rank else lite),
        "methods": refusal(lite if rank else dit_accel.EasyCache()),
        "steps": refusal(lite, steps=4 + rank),
        "seeds": refusal(lite, inputs=dict(hidden_states=torch.randn(1, 12, 5, 8, 8) + rank)),
    }


def groups(rank: int, world: int, methods: tuple[Any, ...]) -> Any:
    """Return how far the outputs of two groups lie from one process's, each of another prompt, and what is refused."""
    transformer, inputs = build("wan")
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"] + rank // 2
    spread = copy.deepcopy(transformer)
    enable_ulysses(spread, world // 2)
    far = [run(one, inputs, methods) for one in (transformer, spread)]
    refusals = []
    for degree, heads, model in ((3, 3, "wan"), (4, 6, "wan"), (2, 4, "mochi")):
        one = diffusers.MochiTransformer3DModel(**MOCHI[0].config) if model == "mochi" else build(model, heads)[0]
        refusals.append(result_of(enable_ulysses, one, degree))
    return apart(*far), far[0].sum().item(), refusals


def lose_one(rank: int, world: int, fault: str) -> None:
    """Run on, while another process is killed or stops answering in the middle of a forward."""
    transformer, inputs = build("wan")
    enable_ulysses(transformer, world)

    def fail(module: Any, given: Any) -> None:
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(25)
        os._exit(1)

    if rank == 1:
        transformer.blocks[1].register_forward_pre_hook(fail)
    run(transformer, inputs, (dit_accel.LiteAttention(block_size=16, dense_steps=0),))
