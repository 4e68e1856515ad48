"""Checks of guidance by a perturbed branch: what is perturbed, what is not, and what is added to the prediction."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..adapters.cross_attention import CrossAttention
from ..adapters.joined_text import JoinedText
from ..attachment.attachment import attach
from ..methods.config import MethodConfig
from ..methods.find import attention_modules
from ..methods.guidance.nag import NAG
from ..methods.guidance.slg import SLG
from ..methods.guidance.softpag import SoftPAG
from .block_checks import Block, blocks_in, replaced, skipped
from .method_cases import MethodCase
from .promises import check_batch, check_free, require_rows_alone
from .recording import WIDE, RecordedCall, recorded, require, require_same, require_within_rounding
from .reference import attention
from .tiny_models import Case, wide_inputs

LAYER = 1


def check_guidance(case: Case) -> str | None:
    """A perturbed branch changes what it names and nothing else, and is added as cond + w (cond - perturbed).

    Neutral settings run no further forward. Heads that are not named, and text where the image alone is perturbed, keep
    their attention; named ones are lerped with V exactly. A branch that begins at the first perturbed block gives the
    same, bit for bit. A skipped block hands its streams on. Guidance in one call gives what two calls give. Where the
    adapter tells the text, a negative one moves the conditional rows alone, and the prompt itself none.
    """
    layers = [name for name, _, _ in attention_modules(case.transformer, case.adapter)]
    _require_negative_text(case)
    if len(layers) < 2:
        return "it has one attention layer"
    inputs = case.inputs(1)
    plain = case.run(inputs)
    neutral = SoftPAG(heads=f"L{LAYER}", u=0.0)
    require(torch.equal(_run(case, inputs, neutral, forwards=1)[0], plain), f"{neutral} changes the output")
    _require_heads(case, inputs, plain)
    _require_blocks(case, inputs, plain, layers[LAYER])
    half = SoftPAG(heads=f"L{LAYER}", u=0.5, scale=2.0, share_prefix=False)
    tried = MethodCase(neutral=neutral, active=half)
    check_batch(case, tried)
    check_free(case, tried)
    return None


def _require_negative_text(case: Case) -> None:
    """The prompt as its own negative changes nothing, another does, and only conditional rows see it."""
    where = case.adapter.cross_attention
    if not isinstance(where, CrossAttention):
        where = case.adapter.joined_text  # type: ignore[assignment]
    if not isinstance(where, CrossAttention | JoinedText):
        return
    inputs, wide = wide_inputs(case.inputs(1)), case.wide()
    if any(inputs.get(name) is not None for name in getattr(where, "alone", ())):
        return
    plain = case.run(inputs, transformer=wide)
    prompt, mask = inputs[where.text], inputs.get(getattr(where, "mask", None) or "encoder_attention_mask")
    text = prompt if mask is None else prompt[:, mask[0].bool()]
    with attach(wide, NAG(negative_embeds=text), backend="reference"):
        require_same(case.run(inputs, transformer=wide), plain, "the prompt as its own negative text moves the output")
    away = NAG(negative_embeds=text.flip(-1), scale=11.0, tau=2.0, alpha=0.7)
    with attach(wide, away, backend="reference"):
        moved = case.run(inputs, transformer=wide)
        require(torch.equal(case.run(inputs, branch="uncond", transformer=wide), plain), "a negative text moves uncond")
    require(not torch.allclose(moved, plain, rtol=1e-6) and bool(moved.isfinite().all()), f"{away} changes nothing")
    require(torch.equal(case.run(inputs, transformer=wide), plain), "a negative text is left behind")
    require_rows_alone(case, (away,), 0, "reference", wide)


def _run(
    case: Case, inputs: Mapping[str, Any], config: MethodConfig, forwards: int
) -> tuple[Tensor, list[RecordedCall]]:
    """Return a guided conditional forward and its planned calls; it must take so many forwards."""
    with attach(case.transformer, config, backend="reference") as attachment:
        with recorded(attachment) as calls:
            out = case.run(inputs)
        ran = attachment.engine.recorder.forwards_run
        require(ran == forwards, f"{config} ran {ran} forwards, not {forwards}")
    return out, calls


def _require_heads(case: Case, inputs: Mapping[str, Any], plain: Tensor) -> None:
    half = SoftPAG(heads=f"L{LAYER}H0", u=0.5, scale=2.0, rows="image")
    moved, calls = _run(case, inputs, half, forwards=2)
    require(
        not torch.equal(moved, plain) and bool(moved.isfinite().all()), f"{half} changes nothing, or gives no number"
    )
    whole, calls_of_whole = _run(case, inputs, SoftPAG(heads=f"L{LAYER}", u=1.0, share_prefix=False), forwards=2)
    for call in calls:
        _require_mixed(call)
    for call in calls_of_whole:
        if call.plan.identity_mix is not None:
            values = call.v.repeat_interleave(call.q.shape[1] // call.v.shape[1], 1)
            require(torch.equal(call.out, values), "perturbed whole, a layer gives something else than its values")
    require(any(call.plan.skips_logits for call in calls_of_whole), "perturbed whole, a layer still computes logits")
    shared, _ = _run(case, inputs, SoftPAG(heads=f"L{LAYER}", u=1.0), forwards=2)
    require(torch.equal(shared, whole), "a branch that begins at its first perturbed block gives something else")


def _require_mixed(call: RecordedCall) -> None:
    """The named head is (1 - u) O + u V in the image's rows; all else is the attention itself."""
    if call.plan.identity_mix is None:
        return
    share = torch.zeros(call.q.shape[1], call.q.shape[2])
    share[0, call.context.layout.visual] = 0.5

    def expected(dtype: torch.dtype) -> Tensor:
        q, k, v = (x.to(dtype) for x in (call.q, call.k, call.v))
        out = attention(call.plan, call.states(), q, k, v, call.valid(), call.scale)
        values = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        return torch.lerp(out, values, share[..., None].to(dtype).expand_as(out))

    seen = torch.ones(call.q.shape[2], dtype=torch.bool)
    valid = call.valid()
    if valid is not None:  # what padded queries see is not defined
        seen = valid.all(0)
    output, low, truth = (part[:, :, seen] for part in (call.out, expected(call.q.dtype), expected(WIDE)))
    require_within_rounding(output, low, truth, "a head is not mixed with V as it should be")


def _require_blocks(case: Case, inputs: Mapping[str, Any], plain: Tensor, layer: str) -> None:
    if case.adapter.blocks == ():
        return
    blocks = [block for block in blocks_in(case) if not block.blocks.beside and layer.startswith(f"{block.name}.")]
    results: dict[str, Any] = {}

    def kept(block: Block, run: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        results[block.name] = run(*args, **kwargs)
        return results[block.name]

    if not all(block.blocks.gives_streams_only for block in blocks):
        with replaced(blocks, kept):
            case.run(inputs)
    with replaced(blocks, partial(skipped, results)):
        without = case.run(inputs)
    guided, _ = _run(case, inputs, SLG(layers=f"L{LAYER}", scale=2.0, start=0.0, stop=1.0), forwards=2)
    expected = (plain.double() + 2.0 * (plain.double() - without.double())).to(plain.dtype)
    torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-5)
