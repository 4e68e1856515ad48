"""What families say of released models, against one committed table: a changed default or recipe shows as a difference.

After a change that is meant, write the table anew with ``python tests/pipelines/test_family_values.py``.
"""

import json
from pathlib import Path
from typing import Any

from dit_accel.adapters.installed import adapters

TABLE = Path(__file__).with_name("family_values.jsonl")
FIELDS = (
    "repo", "layers", "heads", "head_dim", "ffn_dim", "patch", "vae", "size_multiple", "text_tokens", "cross_tokens",
    "height", "width", "num_frames", "num_inference_steps", "forwards_per_step", "experts", "trained_frames", "recipes",
)  # fmt: skip


def values() -> dict[str, dict[str, Any]]:
    """Return adapter -> its recipes, and family -> its values, as JSON knows them."""
    found: dict[str, dict[str, Any]] = {}
    for adapter in adapters().values():
        found[f"adapter {adapter.name}"] = {"recipes": adapter.recipes}
        for family in adapter.families:
            found[f"family {family.name}"] = {name: getattr(family, name) for name in FIELDS}
    return json.loads(json.dumps(found, default=dict))


def table() -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in TABLE.read_text(encoding="utf-8").splitlines()]
    return {row.pop("name"): row for row in rows}


def test_values_are_those_of_the_table():
    found, kept = values(), table()
    changed = {name: (found.get(name), kept.get(name)) for name in {*found, *kept} if found.get(name) != kept.get(name)}
    assert not changed, "what is said now, and what the table says"


if __name__ == "__main__":
    lines = [json.dumps({"name": name, **row}) for name, row in sorted(values().items())]
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")
