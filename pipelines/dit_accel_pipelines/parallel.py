"""Context parallelism by Ulysses, also for transformers for which diffusers has no plan of what is split."""

from typing import Any


def enable_ulysses(transformer: Any, degree: int, **options: Any) -> None:
    """Spread a transformer's tokens and heads over processes, before or after methods are attached.

    It is diffusers' own ``enable_parallelism``, with a plan for HunyuanVideo, which has none there; its text refiner,
    whose tokens every process has, keeps to itself.

    Args:
        transformer: a diffusers transformer, the same on every process; ``torch.distributed`` is set up.
        degree: how many processes share it.
        options: further options of ``ContextParallelConfig``, such as ``ulysses_anything``.

    Raises:
        RuntimeError: if ``torch.distributed`` is not set up.
        ValueError: if diffusers has no plan for the transformer.
    """
    from diffusers import ContextParallelConfig

    config = ContextParallelConfig(ulysses_degree=degree, **options)
    if type(transformer).__name__ != "HunyuanVideoTransformer3DModel":
        transformer.enable_parallelism(config=config)
        return
    transformer.enable_parallelism(config=config, cp_plan=_hunyuan_video())
    for module in transformer.context_embedder.modules():
        if hasattr(module, "processor"):
            module.processor._parallel_config = None


def _hunyuan_video() -> dict[str, Any]:
    """Return what HunyuanVideo splits and gathers: video and text each by itself, and the video's positions."""
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

    stream = ContextParallelInput(split_dim=1, expected_dims=3)
    positions = ContextParallelInput(split_dim=0, expected_dims=2, split_output=True)
    return {
        "rope": {0: positions, 1: positions},
        "transformer_blocks.0": {"hidden_states": stream, "encoder_hidden_states": stream},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }
