"""What one of several processes runs to test context parallelism; here, so that a process that is started finds it."""

import contextlib
import copy
import datetime
import os
import socket
import traceback
from typing import Any
from unittest import mock

import diffusers
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from dit_accel_pipelines.parallel import enable_ulysses
from tiny_models import FLUX, HUNYUAN_TINY
from wan_tiny import TINY as WAN_TINY

import dit_accel

TEXT = 8


def wan() -> tuple[Any, dict[str, Any]]:
    return diffusers.WanTransformer3DModel(**{**WAN_TINY, "num_attention_heads": 4}), dict(
        hidden_states=torch.randn(1, 12, 5, 8, 8), encoder_hidden_states=torch.randn(1, 6, 64)
    )


def flux() -> tuple[Any, dict[str, Any]]:
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(10), indexing="ij")
    return diffusers.FluxTransformer2DModel(**{**FLUX[0].config, "num_attention_heads": 4}), dict(
        hidden_states=torch.randn(1, 80, 4), encoder_hidden_states=torch.randn(1, TEXT, 16),
        pooled_projections=torch.randn(1, 8), txt_ids=torch.zeros(TEXT, 3), guidance=torch.full((1,), 3.5),
        img_ids=torch.stack([rows * 0, rows, columns], -1).flatten(0, 1).float(),
    )  # fmt: skip


def hunyuan() -> tuple[Any, dict[str, Any]]:
    mask = (torch.arange(TEXT)[None] < TEXT - 3).long()
    return diffusers.HunyuanVideoTransformer3DModel(**{**HUNYUAN_TINY, "num_attention_heads": 4}), dict(
        hidden_states=torch.randn(1, 4, 5, 8, 8), encoder_hidden_states=torch.randn(1, TEXT, 16),
        encoder_attention_mask=mask, pooled_projections=torch.randn(1, 8), guidance=torch.full((1,), 6000.0),
    )  # fmt: skip


def ltx() -> tuple[Any, dict[str, Any]]:
    from tiny_models import LTX_TINY

    return diffusers.LTXVideoTransformer3DModel(**{**LTX_TINY, "num_attention_heads": 4, "cross_attention_dim": 64}), (
        dict(
            hidden_states=torch.randn(1, 80, 4), encoder_hidden_states=torch.randn(1, TEXT, 16),
            encoder_attention_mask=(torch.arange(TEXT)[None] < TEXT - 3).long(), num_frames=5, height=4, width=4,
        )
    )  # fmt: skip


MODELS = {"wan": wan, "flux": flux, "hunyuan-video": hunyuan, "ltx": ltx}


def build(name: str, longer: int = 0) -> tuple[Any, dict[str, Any]]:
    """A tiny model of four heads that attends sharply, and what it is given; with so many further text tokens."""
    torch.manual_seed(0)
    transformer, inputs = MODELS[name]()
    for path, weight in transformer.named_parameters():
        if path.endswith(("norm_q.weight", "norm_k.weight")):
            weight.data.mul_(3.0)
    return transformer.eval(), inputs


def denoise(transformer: Any, inputs: dict[str, Any], steps: int = 4) -> torch.Tensor:
    """Return the latents after some told steps with guidance in two calls."""
    x, text = inputs["hidden_states"], inputs["encoder_hidden_states"]
    with torch.no_grad():
        for step in range(steps):
            found = []
            for branch, prompt in (("cond", text), ("uncond", text.flip(-1))):
                with transformer.cache_context(branch, step_index=step, num_inference_steps=steps, sigma=1 - step / 8):
                    given = {**inputs, "hidden_states": x, "encoder_hidden_states": prompt}
                    time = torch.full((1,), 1000.0 - 100 * step)
                    found.append(transformer(**given, timestep=time, return_dict=False)[0])
            x = x - 0.3 * sum(found)
    return x


def enable(transformer: Any, world: int, **options: Any) -> None:
    """Enable context parallelism as on a machine of which every process has an accelerator."""
    with mock.patch.object(torch.accelerator, "device_count", return_value=world):
        enable_ulysses(transformer, world, **options)


def start(rank: int, world: int, port: int, work: Any, found: Any, seconds: float, given: tuple[Any, ...]) -> None:
    """Join the group, and put under the rank what ``work`` gives, or the error that it raises."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=seconds),
    )  # fmt: skip
    try:
        found[rank] = work(rank, world, *given)
    except Exception as error:
        found[rank] = f"{type(error).__name__}: {error}"
        if os.environ.get("PARALLEL_TRACE"):
            traceback.print_exc()
    with contextlib.suppress(Exception):
        dist.barrier()
        dist.destroy_process_group()


def processes(world: int, work: Any, *given: Any, seconds: float = 60) -> dict[int, Any]:
    """Return rank -> what ``work(rank, world, *given)`` gave on it, or its error in words."""
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        port = asked.getsockname()[1]
    with mp.Manager() as manager:
        found = manager.dict()
        spawned = mp.spawn(start, (world, port, work, found, seconds, given), nprocs=world, join=False)
        for process in spawned.processes:
            process.join(seconds * 3)
        alive = [rank for rank, process in enumerate(spawned.processes) if process.is_alive()]
        for rank in alive:
            spawned.processes[rank].kill()
        assert not alive, f"ranks {alive} hang"
        return dict(found)


def compare(rank: int, world: int, model: str, cases: dict[str, tuple[Any, ...]], options: dict[str, Any]) -> Any:
    """Return case -> (how far the processes' output lies from one process's, how far that lies from dense)."""
    transformer, inputs = build(model)
    spread = copy.deepcopy(transformer)
    enable(spread, world, **options)
    plain = denoise(transformer, inputs)
    found = {}
    for name, methods in cases.items():
        try:
            with dit_accel.attach(transformer, *methods):
                alone = denoise(transformer, inputs)
            with dit_accel.attach(spread, *methods) as attachment:
                together = denoise(spread, inputs)
                report = attachment.report()
            found[name] = (together - alone).abs().max().item(), (alone - plain).abs().max().item(), str(report)
        except Exception as error:
            if os.environ.get("PARALLEL_TRACE"):
                traceback.print_exc()
            found[name] = f"{type(error).__name__}: {error}"
    return found
