"""Context parallelism by Ulysses: in groups of the processes, and for transformers for which diffusers has no plan."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from dit_accel.errors import ConfigError

Value = TypeVar("Value")

OURS = ("HunyuanVideoTransformer3DModel",)
"""Transformers for which diffusers has no plan, and this file has one."""


def enable_ulysses(transformer: Any, degree: int, **options: Any) -> None:
    """Spread a transformer's tokens and heads over processes, before or after methods are attached.

    It is diffusers' own ``enable_parallelism``, with a plan for HunyuanVideo, which has none there; its text refiner,
    whose tokens every process has, keeps to itself. Of more processes than the degree each group of so many
    neighbours shares a transformer. It also runs on a CPU.

    Args:
        transformer: a diffusers transformer, the same on every process; ``torch.distributed`` is set up.
        options: further options of ``ContextParallelConfig``, such as ``ulysses_anything``, or a ``mesh`` of
            `ulysses_mesh`, by which a group may go on while others do not.

    Raises:
        ConfigError: if ``torch.distributed`` is not set up, the degree does not divide the processes or the heads, or
            diffusers has no plan for the transformer.
    """
    from diffusers import ContextParallelConfig

    ours = type(transformer).__name__ in OURS
    check_transformer(type(transformer), dict(transformer.config), degree, bool(options.get("ulysses_anything")))
    options = options if "mesh" in options else {"mesh": ulysses_mesh(degree), **options}
    config = ContextParallelConfig(ulysses_degree=degree, **options)
    with _counted_devices():
        transformer.enable_parallelism(config=config, **({"cp_plan": _hunyuan_video()} if ours else {}))
    for module in transformer.context_embedder.modules() if ours else ():
        if hasattr(module, "processor"):
            module.processor._parallel_config = None
    for module in transformer.modules():
        for name, hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).items():
            if name.startswith("cp_input"):
                _know_parameters(hook.module_forward_metadata, type(module))


def ulysses_mesh(degree: int) -> Any:
    """Return the mesh of a ``ContextParallelConfig`` by which each group of ``degree`` neighbours shares one.

    Every process must call this. Its dimensions are ``groups``, ``ring`` (1) and ``ulysses``; that of ``groups`` joins
    the processes that have one place in their groups.
    """
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise ConfigError(
            f"ulysses = {degree} shares a transformer between processes, and torch.distributed is not set up; start "
            f"them with torchrun --nproc-per-node {degree}"
        )
    check_processes(dist.get_world_size(), degree)
    kind = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    shape = (dist.get_world_size() // degree, 1, degree)
    mesh = dist.device_mesh.init_device_mesh(kind.type, shape, mesh_dim_names=("groups", "ring", "ulysses"))
    mesh["ring", "ulysses"]._flatten()  # else diffusers does, in each group when it comes to it, and waits for all
    return mesh


def check_processes(count: int, degree: int) -> None:
    """Raise `ConfigError` for a number of processes that a degree does not divide into groups, or a degree below 1."""
    if degree < 1:
        raise ConfigError(f"ulysses must be 1 or more processes, got {degree}")
    if count % degree:
        started = f"does not divide the {count} processes that were started"
        text = started if count > 1 else "takes as many processes, got 1"
        raise ConfigError(
            f"ulysses = {degree} {text}; start a multiple of it, such as torchrun --nproc-per-node {degree}, or choose "
            "another"
        )


def check_transformer(cls: type, config: Mapping[str, Any], degree: int, anything: bool = False) -> None:
    """Refuse a transformer that so many processes can't share."""
    if cls.__name__ not in OURS and getattr(cls, "_cp_plan", None) is None:
        raise ConfigError(
            f"diffusers has no plan of how {cls.__name__} is split over processes; run it on one, without ulysses"
        )
    heads = config.get("num_attention_heads")
    if isinstance(heads, int) and heads % degree and not anything:
        degrees = ", ".join(str(number) for number in range(1, heads + 1) if heads % number == 0)
        raise ConfigError(f"ulysses = {degree} does not divide the transformer's {heads} heads; choose of {degrees}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Neighbours among the processes that share transformers, or one that shares none."""

    mesh: Any = None  # of `ulysses_mesh`; None: one process by itself

    @property
    def size(self) -> int:
        """Count them."""
        return 1 if self.mesh is None else self.mesh["ulysses"].size()

    def firsts(self, value: Value) -> Value:
        """Return the first process's value, to all of the group; all of them must call it alike."""
        if self.mesh is None:
            return value
        import torch.distributed as dist

        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self.mesh["ulysses"].get_group())
        return gathered[0]

    def share(self, transformer: Any) -> None:
        """Spread a transformer over the group; other groups need not do so."""
        if self.mesh is not None:
            enable_ulysses(transformer, self.size, mesh=self.mesh)


ALONE = Group()


@contextlib.contextmanager
def joined_group(rank: int, degree: int) -> Iterator[Group]:
    """Have the processes that a launcher started find each other, for the block; yields this one's group.

    Where ``torch.distributed`` is set up already, it stays as it is.

    ``degree``: how many neighbours form a group; of 1 nothing is set up.
    """
    if degree == 1:
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    ours = not dist.is_initialized()
    if ours:
        if torch.accelerator.is_available():
            torch.accelerator.set_device_index(rank)
        dist.init_process_group()
    yield Group(mesh=ulysses_mesh(degree))
    if ours:
        dist.destroy_process_group()  # after an error others may wait for it; the launcher ends them


def _know_parameters(metadata: Any, cls: type) -> None:
    """Tell a hook that splits a module's inputs their places: it would ask in the first call, as no full graph can."""
    names = list(inspect.signature(cls.forward).parameters)[1:]
    metadata.cached_parameter_indices = {name: place for place, name in enumerate(names)}


@contextlib.contextmanager
def _counted_devices() -> Iterator[None]:
    """Have torch count the CPU as a device where it counts none: diffusers divides by the number."""
    import torch

    if torch.accelerator.is_available():
        yield
        return
    count, torch.accelerator.device_count = torch.accelerator.device_count, lambda: 1
    try:
        yield
    finally:
        torch.accelerator.device_count = count


def _hunyuan_video() -> dict[str, Any]:
    """Plan HunyuanVideo's split: video and text each by itself, and the video's positions."""
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

    stream = ContextParallelInput(split_dim=1, expected_dims=3)
    positions = ContextParallelInput(split_dim=0, expected_dims=2, split_output=True)
    return {
        "rope": {0: positions, 1: positions},
        "transformer_blocks.0": {"hidden_states": stream, "encoder_hidden_states": stream},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }
