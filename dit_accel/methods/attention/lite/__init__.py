"""LiteAttention: its config and handler, what it carries from call to call, its thresholds files."""
