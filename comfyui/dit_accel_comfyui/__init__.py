"""dit-accel's methods as nodes of ComfyUI."""

from typing import Any


async def comfy_entrypoint() -> Any:
    """Return the extension that ComfyUI asks a folder of nodes for."""
    from .nodes import Extension

    return Extension()


__all__ = ["comfy_entrypoint"]
