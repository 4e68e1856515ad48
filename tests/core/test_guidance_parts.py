"""Which prompt a forward holds, as contexts, classes and adapters say; what says nothing is refused."""

from types import SimpleNamespace

import pytest
import torch
from dit_accel_pipelines.families.flux import FLUX
from dit_accel_pipelines.families.hidream import HIDREAM
from dit_accel_pipelines.families.ideogram4 import IDEOGRAM4
from dit_accel_pipelines.families.wan import WAN
from dit_accel_pipelines.families.z_image import Z_IMAGE
from tiny_models import MODELS
from wan_tiny import tiny_transformer

import dit_accel
from dit_accel import NAG, PAG, SEG, SLG, ConfigError, SoftPAG
from dit_accel.adapters.guidance import Guidance, PipelineCall
from dit_accel.methods.guidance.rows import rows_of, with_rows_again
from dit_accel.methods.prompt_branches import part_of, rows_of_prompt, running_call
from dit_accel.testing.tiny_models import Case

BRANCHES = {
    "pag": PAG(layers="L1", scale=3.0),
    "softpag": SoftPAG(heads="L1H0"),
    "slg": SLG(layers="L1", start=0.0, stop=1.0),
    "seg": SEG(layers="L1"),
}
EITHER = [PAG(layers="L1", mode="free"), NAG(negative_embeds=torch.ones(1, 6, 64))]
BY_NAME = {
    "cond": "cond", "pred_cond": "cond", "cond_uncond/cond": "cond", "uncond": "uncond", "pred_uncond": "uncond",
    "cond_uncond": "both", "uncond_stg": "perturbed", "pred_cond_skip": "perturbed",
}  # fmt: skip


def site(adapter=WAN, running=None, name="transformer", **config):
    transformer = SimpleNamespace(config=SimpleNamespace(**config))
    return SimpleNamespace(adapter=adapter, running=running, name=name, transformer=transformer)


def part(branch, where=None, rows=2, method="pag"):
    return part_of(method, where or site(), SimpleNamespace(branch=branch), torch.zeros(rows, 3))


def test_the_name_of_a_context_tells():
    assert {name: part(name) for name in BY_NAME} == BY_NAME
    for name, rows, text in (("mine", 2, r"cache_context\('mine'\)"), ("cond_uncond", 3, r"'cond_uncond'.*got 3 rows")):
        with pytest.raises(ConfigError, match=rf"pag.*{text}"):
            part(name, rows=rows)


def test_a_loop_that_opens_no_context_holds_the_conditional_prompt_where_the_scale_is_an_input():
    embeds, none = site(FLUX, guidance_embeds=True), site(FLUX, guidance_embeds=False)
    assert part("call 0", embeds) == "cond"
    for where, branch in ((embeds, "call 1"), (none, "call 0"), (site(), "call 0")):
        with pytest.raises(ConfigError, match=r"pag.*loop.*transformer\.cache_context\(name\)"):
            part(branch, where)


class Pipe:
    """A pipeline of a declared way to call its transformer, with so many rows of its own."""

    def __init__(self, forward, keeps=True):
        self.forward, self.keeps = forward, keeps

    def __call__(self, latents):
        if not self.keeps:
            self.kept = latents
            del latents
        return self.forward(self)


class Heir(Pipe):
    pass


class Wrapper(Pipe):
    def __call__(self, latents):
        return super().__call__(latents)


class Other(Pipe):
    def __call__(self, latents):
        return self.forward(self)


class Guided(Other):
    guider = object()


class Silent(Pipe):
    do_classifier_free_guidance = True


def said(calls, cls=Pipe, branch="call 0", rows=2, **more):
    """What a forward holds in a running pipeline of two latents whose class ``Pipe`` is declared."""
    adapter = SimpleNamespace(guidance=Guidance(**{calls: ("Pipe",)}), name="tiny")
    pipe = cls(lambda pipe: part(branch, site(adapter, pipe), rows), **more)
    return pipe(torch.zeros(2, 3))


def test_a_declared_class_tells_by_the_place_of_a_forward_and_its_rows():
    for calls, more, expected in (
        ("alone", dict(branch="call 0"), "cond"),
        ("alone", dict(branch="call 1"), "cond"),
        ("in_turn", dict(branch="call 0"), "cond"),
        ("in_turn", dict(branch="call 1"), "uncond"),
        ("in_turn", dict(branch="cond_uncond", rows=4), "both"),
        ("in_turn", dict(cls=Heir), "cond"),  # the class whose call runs
        ("in_turn", dict(cls=Wrapper), "cond"),
        ("together", dict(rows=2), "cond"),
        ("together", dict(rows=4), "both"),
        ("together", dict(branch="call 1"), "perturbed"),
        ("together", dict(cls=Silent, keeps=False), "both"),  # no latents are held: the attribute tells
        ("alone", dict(cls=Guided, branch="call 0"), "cond"),  # a guider takes the prompt first
        ("alone", dict(cls=Guided, branch="call 1"), "uncond"),
    ):
        assert said(calls, **more) == expected, (calls, more)
    for more, text in (
        (dict(rows=6), r"pag.*Pipe.*2 latents.*got 6 rows"),
        (dict(cls=Other), r"pag.*Other.*adapter 'tiny'"),
        (dict(keeps=False), r"Pipe.*do_classifier_free_guidance"),
    ):
        with pytest.raises(ConfigError, match=text):
            said("together", **more)
    assert running_call(None) == PipelineCall()
    assert running_call(Pipe(None)).classes == ()


def test_what_no_adapter_may_declare():
    for wrong, why in (
        (dict(first_rows="both"), r"first_rows.*'uncond'.*'cond', got 'both'"),
        (dict(uncond_tokens="first"), r"uncond_tokens.*'all'.*'last', got 'first'"),
        (dict(branch_of={"transformer": "both"}), r"branch_of\['transformer'\].*'cond'.*'uncond', got 'both'"),
        (dict(rows={"x": -1}), r"rows\['x'\].*'each'.*None, got -1"),
        (dict(alone=("A",), own={"A": "why"}), r"guidance.*A twice"),
    ):
        with pytest.raises(ConfigError, match=why):
            Guidance(**wrong)


def test_rows_lie_where_the_adapter_says():
    llama = torch.arange(4 * 4 * 3).reshape(4, 4, 3)  # as many layers as rows
    for value in (llama, list(llama)):
        inputs = {"hidden_states": torch.arange(4), "encoder_hidden_states_llama3": value}
        half = rows_of(inputs, slice(2, 4), 4, HIDREAM)
        assert half["hidden_states"].tolist() == [2, 3]
        assert torch.equal(torch.stack(list(half["encoder_hidden_states_llama3"])), llama[:, 2:])
        more = with_rows_again(inputs, slice(2, 4), 4, HIDREAM)["encoder_hidden_states_llama3"]
        assert torch.equal(torch.stack(list(more)), llama[:, [0, 1, 2, 3, 2, 3]])


def test_a_list_with_an_entry_for_each_row_is_cut_by_its_entries():
    """Also where the entries are as long as there are rows."""
    images, texts = [torch.full((4, 1, 2, 2), float(row)) for row in range(4)], [torch.zeros(4, 3)] * 4
    half = rows_of({"x": images, "cap_feats": texts}, slice(0, 2), 4, Z_IMAGE)
    assert [entry.shape for entry in half["x"] + half["cap_feats"]] == [(4, 1, 2, 2)] * 2 + [(4, 3)] * 2
    assert len(with_rows_again({"x": images}, slice(0, 1), 4, Z_IMAGE)["x"]) == 5


def test_what_holds_no_rows_stays_though_it_is_as_long_as_the_batch():
    ids, more, one = torch.zeros(4, 3), [torch.zeros(4, 2), None], torch.zeros(1, 6, 3)
    inputs = {"txt_ids": ids, "controlnet_block_samples": more, "encoder_hidden_states": one}
    half = rows_of(inputs, slice(0, 2), 4, FLUX)
    assert half["txt_ids"] is ids
    assert half["controlnet_block_samples"][0].shape == (2, 2)
    assert half["controlnet_block_samples"][1] is None
    assert half["encoder_hidden_states"].shape == (1, 6, 3)  # one row that serves all of them


def test_rows_follow_the_declared_order_and_a_transformer_of_its_own_tells_by_its_component():
    assert rows_of_prompt(site(), "both", 4, "cond") == (slice(2, 4), 4)
    assert rows_of_prompt(site(Z_IMAGE), "both", 4, "cond") == (slice(0, 2), 4)
    assert rows_of_prompt(site(), "cond", 4, "cond") is None
    assert part("call 0", site(IDEOGRAM4, name="transformer")) == "cond"
    assert part("call 0", site(IDEOGRAM4, name="unconditional_transformer")) == "uncond"
    alone = site(IDEOGRAM4, name="transformer")  # attached by itself, run by a pipeline
    alone.running = SimpleNamespace(transformer=object(), unconditional_transformer=alone.transformer)
    assert part("call 0", alone) == "uncond"


def step_of(transformer, order=("cond", "uncond"), scale=5.0, contexts=True):
    """One step of a loop written by hand around a tiny Wan transformer."""
    noise, outs = torch.Generator().manual_seed(0), {}
    x = torch.randn(1, 12, 5, 8, 8, generator=noise)
    texts = {name: torch.randn(1, 6, 64, generator=noise) for name in ("cond", "uncond")}
    for name in order:
        with torch.no_grad(), transformer.cache_context(name) if contexts else torch.no_grad():
            outs[name] = transformer(x, torch.tensor([900.0]), texts[name], return_dict=False)[0]
    return outs["uncond"] + scale * (outs["cond"] - outs["uncond"])


@pytest.mark.parametrize("name", BRANCHES)
def test_the_conditional_prompt_comes_first_in_a_loop_written_by_hand(name):
    """What is added does not depend on the scale; the other order is refused in the step, but for the free mode."""
    added, transformer = [], tiny_transformer()
    for scale in (1.0, 5.0):
        plain = step_of(transformer, scale=scale)
        with dit_accel.attach(transformer, BRANCHES[name]):
            added.append(step_of(transformer, scale=scale) - plain)
    torch.testing.assert_close(added[0], added[1], rtol=1e-3, atol=1e-4)
    refused = pytest.raises(ConfigError, match=rf"^{name} adds.*step 0.*{name}\.mode = 'free'")
    with dit_accel.attach(transformer, BRANCHES[name]), refused:
        step_of(transformer, ("uncond", "cond"))


@pytest.mark.parametrize("method", [*BRANCHES.values(), *EITHER], ids=lambda method: method.name)
def test_a_loop_written_by_hand_that_opens_no_context_is_refused(method):
    """With contexts, the free mode and NAG take either order."""
    transformer = tiny_transformer()
    refused = pytest.raises(ConfigError, match=rf"^{method.name}.*which prompt")
    with dit_accel.attach(transformer, method), refused:
        step_of(transformer, contexts=False)
    if method in EITHER:
        with dit_accel.attach(transformer, method):
            assert torch.equal(step_of(transformer), step_of(transformer, ("uncond", "cond")))


def test_any_attached_transformer_has_a_context_to_open():
    """SD3's transformer has none of diffusers', so that a loop around it could not tell what it runs."""
    (model, *_) = MODELS["sd3"]
    case = Case(dit_accel.adapters.installed.adapters()["sd3"], model)
    inputs = case.inputs(1)
    plain = case.transformer(**inputs, return_dict=False)[0]
    with dit_accel.attach(case.transformer, BRANCHES["pag"]):
        with torch.no_grad(), case.transformer.cache_context("cond"):
            moved = case.transformer(**inputs, return_dict=False)[0]
        with torch.no_grad(), pytest.raises(ConfigError, match=r"loop.*transformer\.cache_context\(name\)"):
            case.transformer(**inputs)
    assert not torch.equal(moved, plain)
    assert not hasattr(case.transformer, "cache_context")
