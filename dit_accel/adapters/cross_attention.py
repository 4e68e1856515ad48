"""Where a family's text comes in by cross-attention: the modules that attend to it, and what projects it for them."""

import fnmatch
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossAttention:
    """The cross-attention of a family, which attends to text alone, or to text behind pictures.

    Its modules have ``to_q`` and ``to_out[0]``, and take ``hidden_states``, ``encoder_hidden_states`` and, where the
    text is padded, ``attention_mask``.

    Attributes:
        modules: module-name patterns (``blocks.*.attn2``).
        projection: name of the module that each forward calls once, with the text first, to project it for them; None:
            the text comes to them as it is. One that a model lacks counts as None.
        text: name of the forward's input that holds the text, [B, tokens, C].

    Raises:
        ConfigError: for patterns of another type.
    """

    modules: tuple[str, ...]
    projection: str | None = None
    text: str = "encoder_hidden_states"

    def __post_init__(self) -> None:
        if not isinstance(self.modules, tuple) or not all(isinstance(pattern, str) for pattern in self.modules):
            raise ConfigError(f"modules must be a tuple of names, got {self.modules!r}; one entry is (entry,)")

    def found(self, transformer: Any) -> dict[str, Any]:
        """Return name -> module of a transformer's cross-attention; `ConfigError` if there is none."""
        known = {name: module for name, module in transformer.named_modules() if hasattr(module, "processor")}
        matches = {
            name: module
            for name, module in known.items()
            if any(fnmatch.fnmatch(name, pattern) for pattern in self.modules)
        }
        if not matches:
            raise ConfigError(
                f"the adapter looks for the cross-attention {', '.join(self.modules)} in {type(transformer).__name__} "
                "and finds none; update the adapter"
            )
        return matches

    def projecting(self, transformer: Any) -> Any:
        """Return the module that projects a transformer's text, or None."""
        module = transformer
        for part in self.projection.split(".") if self.projection else ():
            module = getattr(module, part, None)
        return None if module is transformer else module
