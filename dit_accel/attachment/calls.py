"""Tells the denoising calls of a step apart where no context names them: by the text that each of them holds.

A branch is a text, and which of the calls with that text in a step it is (two prompts that are equal, or windows of one
clip, are as many branches). So a branch stays itself when another one ends or begins, whatever the order.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Adapter


class Held:
    """Tensors that a caller passed in, to be recognised when they come again: the same unchanged memory, or values.

    They are not copied, but for tensors of ``torch.inference_mode``, which do not tell whether they were written to.
    """

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self._tensors = tuple(x.detach().clone() if x.is_inference() else x.detach() for x in tensors)
        self._versions = tuple(map(_version, self._tensors))
        self._memory = tuple(map(_memory, tensors))

    def is_unchanged_memory(self, tensors: tuple[Tensor, ...]) -> bool:
        """Tell whether these are the same tensors, not written to since; waits for nothing."""
        memory = tuple(map(_memory, tensors))
        return None not in (*self._versions, *memory) and self._memory == memory and self._is_intact()

    def has_values(self, tensors: tuple[Tensor, ...]) -> bool:
        """Tell whether these hold the same numbers; may wait for the device."""
        return (
            self._is_intact()
            and len(self._tensors) == len(tensors)
            and all(
                one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
                for one, other in zip(self._tensors, tensors, strict=True)
            )
            and all(torch.equal(one, other) for one, other in zip(self._tensors, tensors, strict=True))
        )

    def _is_intact(self) -> bool:
        return self._versions == tuple(map(_version, self._tensors))


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


def _memory(x: Tensor) -> Any:
    """Return what tells a tensor's memory from any other that exists; None for one that has none of its own."""
    try:
        address = x.data_ptr()
    except RuntimeError:  # a wrapper around other tensors, such as what a collective will have gathered
        return None
    return (address, x.shape, x.stride(), x.dtype, x.device) if address else None


def text_in(adapter: Adapter, inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Return the text in a forward's inputs, as its adapter names it, else all inputs but latents and timestep."""
    named = (getattr(adapter.cross_attention, "text", None), getattr(adapter.joined_text, "text", None))
    for name in (*named, "encoder_hidden_states"):
        if name is not None and (texts := tensors_in(inputs.get(name))):
            return texts
    others = (value for name, value in inputs.items() if name not in (adapter.latents, adapter.timestep))
    return tuple(x for value in others for x in tensors_in(value))


def tensors_in(value: Any) -> tuple[Tensor, ...]:
    """Return the tensors in an input, which may be one or a list of them."""
    values = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(x for x in values if isinstance(x, Tensor))


class Calls:
    """The denoising calls of one transformer in one run, numbered as they were first seen.

    Attributes:
        text: number of the text of the last call; -1: it held none.
    """

    def __init__(self) -> None:
        self.begin_run()

    def begin_run(self) -> None:
        """Forget all calls."""
        self._texts: dict[int, list[Held]] = {}  # of each text the objects that it came in
        self._known: list[tuple[int, int]] = []  # number -> text, and which of the calls with it
        self._here: dict[tuple[int, int], None] = {}  # those of this timestep, in their order
        self._number = self._since = -1
        self.text = -1
        self._times: dict[int, int] = {}
        self._count: int | None = None

    def number(self, step: int, text: tuple[Tensor, ...], repeats: bool) -> tuple[int, bool]:
        """Return the number of a call, and whether what was learned so far may be another call's that had this number.

        Args:
            step: which of the different timesteps of the run is the call's, from 0.
            text: what it holds, as `text_in` gives it.
            repeats: the scheduler evaluates the model twice at a timestep, so that all calls come again.
        """
        lost = False
        if step != self._number:
            if not text and not repeats:  # the n-th call is another one where there are more or fewer of them
                lost = self._count not in (None, len(self._here))
            self._count = len(self._here) if self._known else None
            self._number, self._here, self._times = step, {}, {}
        which = self.text = self._text_number(text)
        time = self._times[which] = self._times.get(which, -1) + 1
        if repeats and self._since != step:
            time %= max(1, sum(one == which for one, _ in self._known))
        call = which, time
        if call not in self._known and time == 0 and self._since != step and len(self._known) > len(self._here):
            # a text never seen, while one that was is still to come: it may be that one, changed
            lost, self._known = True, list(self._here)
            self._texts = {one: self._texts[one] for one in {which, *(one for one, _ in self._known)} if one >= 0}
            self._since = step
        if not self._known:
            self._since = step
        if call not in self._known:
            self._known.append(call)
        self._here[call] = None
        return self._known.index(call), lost

    def _text_number(self, text: tuple[Tensor, ...]) -> int:
        if not text:
            return -1
        for number, objects in self._texts.items():
            if any(held.is_unchanged_memory(text) for held in objects):
                return number
        for number, objects in self._texts.items():
            if any(held.has_values(text) for held in objects):
                objects[1:] = [Held(text)]
                return number
        number = 1 + max(self._texts, default=-1)
        self._texts[number] = [Held(text)]
        return number
