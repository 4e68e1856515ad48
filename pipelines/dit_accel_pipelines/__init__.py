"""Model families and the generate command, registered by entry point as a stranger's would be."""

from typing import TYPE_CHECKING, Any

from .finetuning.command import finetune_model
from .generation.commands import describe_model, generate_video
from .generation.serve import print_server
from .generation.ui import serve_page

if TYPE_CHECKING:
    from .families.all_families import ADAPTERS, VIDEO

COMMANDS = {
    "generate": generate_video,
    "describe": describe_model,
    "finetune": finetune_model,
    "ui": serve_page,
    "serve": print_server,
}

__all__ = ["ADAPTERS", "COMMANDS", "VIDEO"]


def __getattr__(name: str) -> Any:
    """Load the families when they are requested: what only lists commands has no need of them."""
    if name not in ("ADAPTERS", "VIDEO"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .families import all_families

    return getattr(all_families, name)
