"""NAG in joined attention, written down for the tests apart from the method.

The conditional forward and one of the negative text run in two threads, each with its own text alone. At each attention
over picture and text they meet, and go on with the same picture's rows.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor


class Meeting:
    """Where both threads exchange what their attention gave."""

    def __init__(self, picture: int, before: bool, scale: float, tau: float, alpha: float) -> None:
        self.picture, self.before = picture, before
        self.scale, self.tau, self.alpha = scale, tau, alpha
        self.met = 0
        self._barrier = threading.Barrier(2, timeout=60)
        self._given: list[Any] = [None, None]
        self._dense = torch.nn.functional.scaled_dot_product_attention

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
        out = self._dense(query, key, value, *rest, **options)
        side = getattr(threading.current_thread(), "side", None)
        if side is None or query.shape[2] <= self.picture:  # the picture alone, or text alone
            return out
        text = query.shape[2] - self.picture
        rows = slice(text, None) if self.before else slice(0, self.picture)
        self._given[side] = out[:, :, rows]
        self._barrier.wait()
        positive, negative = self._given
        self._barrier.wait()
        self.met += 1
        led = self.scale * positive - (self.scale - 1) * negative
        length = {name: x.abs().sum((1, 3), keepdim=True) for name, x in (("led", led), ("plain", positive))}
        ratio = length["led"] / length["plain"]
        led = torch.where(ratio > self.tau, led * self.tau / ratio, led)
        out = out.clone()
        out[:, :, rows] = self.alpha * led + (1 - self.alpha) * positive
        return out

    def run(self, forwards: tuple[Callable[[], Tensor], Callable[[], Tensor]]) -> Tensor:
        """Return what the first of two forwards gives, which run together."""
        made: list[Any] = [None, None]

        def work(side: int) -> None:
            threading.current_thread().side = side
            try:
                with torch.no_grad():
                    made[side] = forwards[side]()
            except BaseException as error:
                made[side] = error
                self._barrier.abort()

        threads = [threading.Thread(target=work, args=(side,)) for side in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for one in made:
            if isinstance(one, BaseException):
                raise one
        return made[0]


@contextlib.contextmanager
def negative_pairs(
    transformer: Any, embeds: Tensor, meeting: Meeting, *, mask: str | None, conditional: Callable[[int], slice | None]
) -> Iterator[None]:
    """Let a transformer's conditional forwards be NAG's formula.

    Args:
        transformer: the transformer, with nothing attached.
        embeds: the negative text, [1, tokens, C], all of it valid.
        meeting: how far it leads, and where the picture stands.
        mask: name of the input that tells valid text.
        conditional: number of the forward -> its conditional rows, the last ones; None: it has none.
    """
    plain, count = transformer.forward, [0]

    def forward(**inputs: Any) -> Any:
        rows, count[0] = conditional(count[0]), count[0] + 1
        if rows is None:
            return plain(**inputs)
        batch = len(inputs["hidden_states"])
        own = {
            name: value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == batch else value
            for name, value in inputs.items()
        }
        away = {**own, "encoder_hidden_states": embeds}
        if mask is not None:
            away[mask] = torch.ones(embeds.shape[:2], dtype=torch.bool)
        led = meeting.run(tuple(lambda one=one: plain(**one)[0] for one in (own, away)))
        if rows.start == 0:
            return (led,)
        return (torch.cat([plain(**inputs)[0][: rows.start], led]),)

    with (
        mock.patch.object(transformer, "forward", forward),
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", meeting.attend),
    ):
        yield
