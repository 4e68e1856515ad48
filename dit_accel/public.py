"""The public names of `dit_accel` and the modules they live in, so that `import dit_accel` loads none of them."""

HOMES: dict[str, str] = {
    "Attachment": "attachment.attachment",
    "attach": "attachment.attachment",
    "Description": "estimate.describe",
    "describe": "estimate.describe",
    "AttachError": "errors",
    "ConfigError": "errors",
    "DitAccelError": "errors",
    "MissingBackend": "errors",
    "UnsupportedModel": "errors",
    "DeltaAttention": "methods.attention.delta",
    "SparseD": "methods.attention.sparsed",
    "LiteAttention": "methods.attention.lite.handler",
    "RadialAttention": "methods.attention.radial",
    "SolAttention": "methods.attention.sol",
    "UltraViCo": "methods.attention.ultravico",
    "Report": "report.report",
}
"""Name -> its module, below `dit_accel`."""
