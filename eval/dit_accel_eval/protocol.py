"""The protocol by which accelerated models are compared: its version, its rules and its prompts."""

import tomllib
from importlib.resources import files

PROTOCOL = "1"  # version of the protocol; it rises when the same clips would be measured, paired or judged otherwise

USES = ("choosing", "judging")
"""What the prompts of a list are for: settings and rivals are chosen on the one, and judged on the other."""


def protocol_rules() -> str:
    """Return the rules as a numbered list in Markdown."""
    return (files("dit_accel_eval") / "protocol.md").read_text(encoding="utf-8").strip()


def protocol_prompts(use: str) -> dict[str, tuple[str, ...]]:
    """Return category -> its prompts for one of `USES`."""
    data = tomllib.loads((files("dit_accel_eval") / "prompts.toml").read_text(encoding="utf-8"))
    return {category["name"]: tuple(category[use]) for category in data["category"]}


def prompts_in_order(use: str) -> tuple[str, ...]:
    """Return the prompts for one of `USES`, those first that come first in each category, so that any start is even."""
    return tuple(prompt for row in zip(*protocol_prompts(use).values(), strict=True) for prompt in row)
