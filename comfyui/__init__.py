"""This folder as ComfyUI finds it in ``custom_nodes``: the nodes of the package inside."""

from .dit_accel_comfyui import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
