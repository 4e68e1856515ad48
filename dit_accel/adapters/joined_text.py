"""Where a family's text joins the self-attention: the forward's inputs that hold it, and its place in the sequence."""

from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinedText:
    """The text of a family whose attention runs over visual and text tokens at once, in all rows of a batch at once.

    All tokens but the text's are streams of the picture, references included.

    Attributes:
        place: where the text stands in the sequence: its first tokens (``before``) or its last ones (``after``).
        text: name of the forward's input that holds the text, [B, tokens, C]; each token of it is one of the sequence.
        mask: name of the input that tells its valid tokens, [B, tokens]; None: the model has none, and all texts are of
            one length.
        alone: names of inputs that belong to the given rows alone, such as cached keys; where one is given, no negative
            text can be laid beside the prompt.
        registers: tokens of the model's own between the text and the end of the sequence where it stands.

    Raises:
        ConfigError: for another place.
    """

    place: Literal["before", "after"]
    text: str = "encoder_hidden_states"
    mask: str | None = None
    alone: tuple[str, ...] = ()
    registers: int = 0

    def __post_init__(self) -> None:
        if self.place not in ("before", "after"):
            raise ConfigError(f"place must be 'before' or 'after', got {self.place!r}; use one of them")

    def others(self, text: int, tokens: int) -> slice:
        """Return the slice of the tokens that are no text, in a sequence of ``tokens`` of which ``text`` are text."""
        taken = text + self.registers
        return slice(taken, tokens) if self.place == "before" else slice(0, tokens - taken)
