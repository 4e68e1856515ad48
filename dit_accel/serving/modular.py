"""A block of modular pipelines that attaches methods to the transformers of the blocks behind it."""

import weakref
from typing import Any

from diffusers.modular_pipelines import ComponentSpec, InputParam, ModularPipelineBlocks

from ..attachment.attachment import Attachment, attach, attachment_of
from .settings import ServerSetting, read_setting

_OURS: "weakref.WeakKeyDictionary[Attachment, ServerSetting]" = weakref.WeakKeyDictionary()
"""Attachment that a block made -> what it attached; not in the block, which diffusers copies."""


class AttachMethods(ModularPipelineBlocks):
    """Attaches what a call or the block names, before the blocks behind it denoise.

    ``blocks.sub_blocks.insert(name, block, index)`` puts it in. What it attaches stays on the pipeline for the next
    call, and is made anew where that names another setting.
    ``dit_accel.attachment_of(pipe)`` gives the attachment, for ``report()``.

    Args:
        setting: a preset's name, ``none``, or the path of a TOML file of methods; what a call names as ``dit_accel``
            comes first.
        transformers: components that the block itself expects; empty where blocks behind it expect them.
    """

    def __init__(self, setting: str = "balanced", transformers: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.setting, self.transformers = setting, transformers

    @property
    def description(self) -> str:
        """Say what the block does, in one sentence."""
        return "Attaches dit-accel's methods to the transformers of the pipeline."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """Give the transformers that were named, of whatever class."""
        return [ComponentSpec(name) for name in self.transformers]

    @property
    def inputs(self) -> list[InputParam]:
        """Give the setting of one call."""
        what = "preset (careful, balanced, fast), none, or the path of a TOML file of methods"
        return [InputParam("dit_accel", type_hint=str, default=None, description=what)]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        """Attach, if this call's setting is not attached already."""
        block_state: Any = self.get_block_state(state)
        wanted = read_setting(block_state.dit_accel or self.setting)
        attached = attachment_of(components)
        if attached is not None and attached in _OURS:
            if _OURS[attached] == wanted:
                return components, state
            attached.detach()
        if not wanted.empty:
            _OURS[attach(components, *wanted.methods, preset=wanted.preset)] = wanted
        return components, state
