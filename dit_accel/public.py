"""The public names of `dit_accel`, loaded when they are requested; ``__init__.pyi`` gives type checkers the same."""

from importlib import import_module
from importlib.metadata import version
from typing import Any

MODULES = {
    "attachment.attachment": "Attachment attach attachment_of",
    "errors": "AttachError ConfigError DitAccelError MissingBackend ProcessLost UnsupportedModel",
    "estimate.describe": "Description describe",
    "estimate.recommend": "recommend",
    "estimate.recommendation": "Recommendation Setting",
    "methods.attention.delta": "DeltaAttention",
    "methods.attention.dfa": "DFA",
    "methods.attention.lite.lite_config": "LiteAttention",
    "methods.attention.lvsa": "LVSA",
    "methods.attention.radial": "RadialAttention",
    "methods.attention.sol": "SolAttention",
    "methods.attention.sparsed": "SparseD",
    "methods.attention.ultravico": "UltraViCo",
    "methods.caches.db": "DBCache FirstBlockCache",
    "methods.caches.easy": "EasyCache",
    "methods.caches.mag": "MagCache",
    "methods.caches.profiling": "ProfilingCache",
    "methods.caches.prune": "DBPrune",
    "methods.caches.reference": "ReferenceCache",
    "methods.caches.sea": "SeaCache",
    "methods.caches.static": "StaticCache",
    "methods.caches.tea": "TeaCache",
    "methods.guidance.autoguidance": "AutoGuidance",
    "methods.guidance.cfg_cache": "CFGCache",
    "methods.guidance.nag": "NAG",
    "methods.guidance.seg": "SEG",
    "methods.guidance.slg": "SLG",
    "methods.guidance.softpag": "PAG SoftPAG",
    "methods.positions.rope": "RoPE",
    "methods.positions.ultraimage": "UltraImage",
    "plan.layout": "TokenLayout",
    "report.report": "Report",
}
"""Module, below `dit_accel` -> its public names."""

HOMES = {name: module for module, names in MODULES.items() for name in names.split()}
"""Name -> its module, below `dit_accel`."""


def public_name(name: str) -> Any:
    """Load a public name of `dit_accel`; the package's ``__getattr__``."""
    if name == "__version__":
        return version("dit-accel")
    if name not in HOMES:
        raise AttributeError(f"module 'dit_accel' has no attribute {name!r}")
    return getattr(import_module(f"dit_accel.{HOMES[name]}"), name)
