"""The public names of `dit_accel` and the modules they live in, so that `import dit_accel` loads none of them."""

from importlib import import_module
from importlib.metadata import version
from typing import Any

HOMES: dict[str, str] = {
    "Attachment": "attachment.attachment",
    "attach": "attachment.attachment",
    "attachment_of": "attachment.attachment",
    "Description": "estimate.describe",
    "describe": "estimate.describe",
    "AttachError": "errors",
    "ConfigError": "errors",
    "DitAccelError": "errors",
    "MissingBackend": "errors",
    "ProcessLost": "errors",
    "UnsupportedModel": "errors",
    "DFA": "methods.attention.dfa",
    "DeltaAttention": "methods.attention.delta",
    "LVSA": "methods.attention.lvsa",
    "LiteAttention": "methods.attention.lite.config",
    "RadialAttention": "methods.attention.radial",
    "RoPE": "methods.positions.rope",
    "SolAttention": "methods.attention.sol",
    "SparseD": "methods.attention.sparsed",
    "UltraImage": "methods.positions.ultraimage",
    "UltraViCo": "methods.attention.ultravico",
    "DBCache": "methods.caches.db",
    "DBPrune": "methods.caches.prune",
    "EasyCache": "methods.caches.easy",
    "FirstBlockCache": "methods.caches.db",
    "MagCache": "methods.caches.mag",
    "ProfilingCache": "methods.caches.profiling",
    "StaticCache": "methods.caches.static",
    "TeaCache": "methods.caches.tea",
    "NAG": "methods.guidance.nag",
    "PAG": "methods.guidance.softpag",
    "SLG": "methods.guidance.slg",
    "SoftPAG": "methods.guidance.softpag",
    "Report": "report.report",
    "TokenLayout": "plan.layout",
}
"""Name -> its module, below `dit_accel`."""


def public_name(name: str) -> Any:
    """Return what `dit_accel` gives by a public name; the package's ``__getattr__``.

    Raises:
        AttributeError: for another name.
    """
    if name == "__version__":
        return version("dit-accel")
    if name not in HOMES:
        raise AttributeError(f"module 'dit_accel' has no attribute {name!r}")
    return getattr(import_module(f"dit_accel.{HOMES[name]}"), name)
