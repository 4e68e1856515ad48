"""Which denoising call of a step is which, where no context names them: told by the text that each holds."""

from types import SimpleNamespace

import pytest
import torch

from dit_accel.adapters.installed import adapters
from dit_accel.attachment.layers import Calls, RememberedTensors, TransformerState, text_in

COND, UNCOND, OTHER = (torch.randn(1, 4, 8) for _ in range(3))


def numbered(*steps, repeats=False):
    """The numbers of the calls of some steps, by the texts they hold; a star where all is dropped before."""
    calls, found = Calls(), []
    for step, texts in enumerate(steps):
        numbers = [calls.number(step, (text,) if text is not None else (), repeats) for text in texts]
        found.append(" ".join(f"{number}{'*' * lost}" for number, lost in numbers))
    return found


@pytest.mark.parametrize("order", [(COND, UNCOND), (UNCOND, COND)], ids=["cond first", "uncond first"])
def test_a_branch_keeps_its_number_when_guidance_ends_and_begins_again(order):
    cond = str([one is COND for one in order].index(True))
    assert numbered(order, order, [COND], [COND], order, order[::-1]) == ["0 1", "0 1", cond, cond, "0 1", "1 0"]


def test_a_branch_that_begins_later_is_a_further_one():
    assert numbered([COND], [COND, UNCOND], [COND, UNCOND]) == ["0", "0 1", "0 1"]
    # first in its step it may be the other one, with another text: nothing that was learned is used
    assert numbered([COND], [UNCOND, COND], [UNCOND, COND], [COND]) == ["0", "0* 1", "0 1", "1"]


def test_equal_texts_are_branches_by_their_order():
    assert numbered([COND, COND], [COND, COND], [COND]) == ["0 1", "0 1", "0"]
    assert numbered([COND, UNCOND] * 3, [COND, UNCOND] * 3) == ["0 1 2 3 4 5"] * 2  # windows of one picture


def test_a_scheduler_that_evaluates_twice_comes_to_the_same_branches_again():
    assert numbered([UNCOND, COND], [UNCOND, COND] * 2, [COND] * 2, repeats=True) == ["0 1", "0 1 0 1", "1 1"]
    assert numbered([COND, COND], [COND] * 4, repeats=True) == ["0 1", "0 1 0 1"]


def test_texts_made_anew_are_told_by_their_values():
    steps = [[UNCOND.clone(), COND.clone()], [UNCOND.clone(), COND.clone()], [COND.clone()]]
    assert numbered(*steps) == ["0 1", "0 1", "1"]
    embeds = torch.cat([UNCOND, COND])
    assert numbered(*([embeds[:1], embeds[1:]] for _ in range(3)), [embeds[1:]]) == ["0 1"] * 3 + ["1"]
    with torch.inference_mode():
        assert numbered([UNCOND.clone(), COND.clone()], [COND.clone(), UNCOND.clone()]) == ["0 1", "1 0"]


def test_a_text_that_changes_drops_what_was_learned_before_its_forward():
    assert numbered(*([torch.randn(1, 4, 8)] for _ in range(3))) == ["0", "0*", "0*"]
    assert numbered([COND, UNCOND], [COND, OTHER], [COND, OTHER]) == ["0 1", "0 1*", "0 1"]
    calls = Calls()
    for step in range(50):
        calls.number(step, (torch.randn(1, 4, 8),), False)
    assert len(calls._texts) == len(calls._known) == 1  # nothing piles up


def test_without_texts_the_place_tells_and_a_change_of_their_number_drops_what_was_learned():
    assert numbered(*([None] * count for count in (2, 2, 1, 1))) == ["0 1", "0 1", "0", "0*"]


def test_tensors_are_recognised_by_memory_or_values():
    base = torch.arange(8.0).reshape(2, 4)
    held = RememberedTensors((base[0],))
    assert held.is_unchanged_memory((base[0],))
    assert not held.is_unchanged_memory((base[1],))
    assert not held.is_unchanged_memory((base[0].clone(),))
    assert held.has_values((base[0].clone(),))
    assert not held.has_values((base[0].double(),))
    assert not held.has_values((base[0], base[0]))
    base[1] += 1  # a view's version is that of the whole
    assert not held.is_unchanged_memory((base[0],))
    meta = torch.empty(3, device="meta")
    assert not RememberedTensors((meta,)).is_unchanged_memory((meta,))


def test_the_text_is_the_input_that_the_adapter_names():
    def adapter(**fields):
        return SimpleNamespace(
            **{"cross_attention": None, "joined_text": "no text of its own", "latents": "x", "timestep": "t", **fields}
        )

    inputs = {"x": COND, "t": torch.ones(1), "encoder_hidden_states": UNCOND, "caption": OTHER, "flag": True}
    assert text_in(adapter(), inputs) == (UNCOND,)
    assert text_in(adapter(joined_text=SimpleNamespace(text="caption")), inputs) == (OTHER,)
    assert text_in(adapter(cross_attention=SimpleNamespace(text="missing")), inputs) == (UNCOND,)
    inputs = {"x": COND, "t": torch.ones(1), "features": [OTHER, UNCOND], "mask": None}
    assert text_in(adapter(), inputs) == (OTHER, UNCOND)
    assert text_in(adapter(), {"x": COND}) == ()


def test_calls_are_numbered_and_those_of_a_prompt_s_own_transformer_after_it():
    wan = TransformerState("transformer", torch.nn.Identity(), adapters()["wan"])
    own = TransformerState("unconditional_transformer", torch.nn.Identity(), adapters()["ideogram4"])
    names = []
    for wan.calls in range(2):
        own.calls = wan.calls
        names += [wan.branch, own.branch]
    assert names == ["call 0", "uncond", "call 1", "uncond 1"]
