"""The public names of `dit_accel` and the modules they live in, so that `import dit_accel` loads none of them."""

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
    "UnsupportedModel": "errors",
    "DeltaAttention": "methods.attention.delta",
    "LiteAttention": "methods.attention.lite.config",
    "RadialAttention": "methods.attention.radial",
    "SolAttention": "methods.attention.sol",
    "SparseD": "methods.attention.sparsed",
    "UltraViCo": "methods.attention.ultravico",
    "Report": "report.report",
    "TokenLayout": "plan.layout",
}
"""Name -> its module, below `dit_accel`."""
