"""The public names of `dit_accel` and the modules they live in, so that `import dit_accel` loads none of them."""

HOMES: dict[str, str] = {
    "Attachment": "attachment",
    "attach": "attachment",
    "Description": "description",
    "describe": "description",
    "AttachError": "errors",
    "ConfigError": "errors",
    "DitAccelError": "errors",
    "MissingBackend": "errors",
    "UnsupportedModel": "errors",
    "DeltaCorrection": "methods.delta",
    "FrozenPattern": "methods.frozen",
    "LiteAttention": "methods.lite",
    "RadialAttention": "methods.radial",
    "SolAttention": "methods.sol",
    "UltraViCo": "methods.ultravico",
    "Report": "report",
}
"""Name -> its module, below `dit_accel`."""
