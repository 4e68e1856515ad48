"""Sparse attention through ComfyUI's slot: what it gives, what it declines and to whom, and what the report says."""

import comfy_stand_in as comfy
import pytest
import torch
from dit_accel_comfyui.patch import patch_of, with_method

from dit_accel.methods.attention.sparsed import SparseDHandler

SMALL = "block_size = 16\ndense_layers = 0"
ALL = {"sol": "beta = -8.0", "sparsed": "density = 1.0", "lite": "threshold = -1000.0", "radial": "decay = 100.0"}
NOISE = torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
WORDS = [torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3)]


def sparse(model, method="sol", options="", **given):
    given = {"dense_steps": 0.2, "min_tokens": 1, **given}
    return with_method(comfy.Patcher(model), method, f"{SMALL}\n{options}", "torch", **given)


def report(patcher):
    found = patch_of(patcher).last.report
    assert found is not None
    return found


def run(patcher, model=None, noise=NOISE, **options):
    return comfy.sample(patcher if model is None else comfy.Patcher(model), noise, WORDS, **options)


@pytest.mark.parametrize("method", ["sol", "sparsed", "lite"])
@pytest.mark.parametrize("size", [64, 128])
def test_settings_that_keep_every_tile_give_dense_attention(method, size):
    model = comfy.Wan(size=size)
    patcher = sparse(model, method, ALL[method])
    torch.testing.assert_close(run(patcher), run(None, model), rtol=1e-4, atol=1e-4)
    assert {one.exact for one in report(patcher).forwards[2:]} == {1.0}


@pytest.mark.parametrize(("method", "options"), [("sol", "beta = 1.0"), ("sparsed", "density = 0.4"), ("radial", "")])
@pytest.mark.parametrize("together", [True, False])
def test_steps_after_the_dense_ones_are_sparse_and_the_report_says_so(method, options, together):
    model = comfy.Wan()
    patcher = sparse(model, method, options)
    out, dense = run(patcher, together=together), run(None, model)
    assert not torch.allclose(out, dense, rtol=1e-3, atol=1e-3)
    told = report(patcher)
    rows = 1 if together else 2
    assert [one.step for one in told.forwards] == [step for step in range(6) for _ in range(rows)]
    assert all(one.kind == "dense" and sum(one.dense.values()) == 2 for one in told.forwards[: 2 * rows])
    assert all(one.planned == 2 and one.exact is not None and one.exact < 1 for one in told.forwards[2 * rows :])
    assert told.speedup is not None
    assert {one.branch for one in told.forwards} == ({"cond_uncond"} if together else {"cond", "uncond"})


def test_a_second_run_is_as_the_first_and_another_size_may_follow():
    patcher = sparse(comfy.Wan(), "sparsed", "density = 0.3")
    first = run(patcher)
    assert run(patcher, noise=NOISE[..., :6, :]).shape[3] == 6
    assert torch.equal(run(patcher), first)


def test_a_picture_keeps_its_text_exact():
    model = comfy.Flux()
    patcher = sparse(model, "sol", "beta = 8.0", dense_steps=0)
    noise = torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(run(patcher, noise=noise), run(None, model, noise=noise), rtol=1e-3, atol=1e-3)
    told = report(patcher)
    assert not told.problems
    tiles = -(-149 // 16)  # 5 of text behind 144: the last tile's row and column, a band of three, no more
    band = 3 * tiles - 2
    assert told.forwards[0].exact == pytest.approx((band + 2 * (tiles - 2)) / tiles**2, abs=0.02)


def test_what_held_the_slot_gets_what_is_declined_as_it_came():
    seen = []

    def before(func, q, k, v, heads, *args, **kwargs):
        seen.append((q.shape[1], k.shape[1], kwargs.get("skip_output_reshape")))
        return func(q, k, v, heads, *args, **kwargs)

    model, order = comfy.Wan(), []
    for held_first in (True, False):
        patcher = comfy.Patcher(model)
        if held_first:
            patcher.model_options["transformer_options"][comfy.SLOT] = before
        patcher = with_method(patcher, "sol", SMALL, "torch", dense_steps=0.5, min_tokens=1)
        if not held_first:
            patcher.model_options["transformer_options"][comfy.SLOT] = before
        seen.clear()
        order.append(run(patcher))
        cross, own = [one for one in seen if one[1] == 5], [one for one in seen if one[1] == 64]
        assert (len(cross), len(own)) == (12, 6)
        assert patcher.model_options["transformer_options"][comfy.SLOT] is before
    assert torch.equal(*order)


def test_dense_steps_are_the_same_to_the_bit():
    model = comfy.Wan()
    patcher = sparse(model, "sol", dense_steps=0.999)
    assert torch.equal(run(patcher), run(None, model))
    assert report(patcher).speedup is not None


def test_a_model_is_not_changed_by_the_node():
    patcher = comfy.Patcher(comfy.Wan())
    new = with_method(patcher, "sol", "", "auto")
    assert not patcher.wrappers
    assert not patcher.model_options["transformer_options"]
    both = with_method(new, "easycache", "")
    assert [len(ones) for of in both.wrappers.values() for ones in of.values()] == [1, 1]
    assert [config.name for config in patch_of(both).configs] == ["sol", "easycache"]
    assert len(patch_of(new).configs) == 1
    assert patch_of(both).last is not patch_of(new).last


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("sol", "no_such = 1", "no_such"), ("sol", "beta = 'much'", "beta"), ("sol", "beta = ", "TOML"),
        ("nothing", "", "nothing"), ("sparsed", "density = 3.0", "density"), ("sol", "[radial]", "radial"),
    ],
)  # fmt: skip
def test_settings_that_are_refused_leave_the_model_dense_with_a_line_why(method, options, said):
    model = comfy.Wan()
    patcher = with_method(comfy.Patcher(model), method, options, "torch", min_tokens=1)
    assert torch.equal(run(patcher), run(None, model))
    (problem,) = report(patcher).problems
    assert said in problem
    assert "\n" not in problem


def test_a_method_that_another_excludes_is_left_out_and_the_other_acts():
    model = comfy.Wan()
    patcher = with_method(sparse(model), "sol", "beta = 3.0", "torch")
    assert torch.equal(run(patcher), run(sparse(model)))
    (problem,) = report(patcher).problems
    assert problem.startswith("sol ")


def test_tokens_that_no_grid_places_stay_dense():
    class Odd(comfy.Wan):
        patch_size = None

    model = Odd()
    patcher = sparse(model, dense_steps=0)
    assert torch.equal(run(patcher), run(None, model))
    ((why, count),) = report(patcher).forwards[0].dense.items()
    assert "patch_size" in why
    assert count == 2


def test_text_as_long_as_the_latents_is_not_taken_for_them():
    model = comfy.Wan()
    patcher = sparse(model, dense_steps=0)
    words = [torch.randn(1, 64, 8)] * 2
    out = comfy.sample(patcher, NOISE, words)
    assert torch.equal(out, comfy.sample(comfy.Patcher(model), NOISE, words))
    assert "64" in next(iter(report(patcher).forwards[0].dense))


def test_who_takes_the_slot_inside_the_forward_and_shares_nothing_is_named():
    class Grabbing(comfy.Wan):
        def forward_orig(self, x, timestep, context, options):
            options[comfy.SLOT] = lambda func, *args, **kwargs: func(*args, **kwargs)
            return super().forward_orig(x, timestep, context, options)

    model = Grabbing()
    patcher = sparse(model, dense_steps=0)
    assert torch.equal(run(patcher), run(None, model))
    (problem,) = report(patcher).problems
    assert "Grabbing" in problem


def test_a_method_that_refuses_the_sequence_says_so_once():
    model = comfy.Flux()
    patcher = sparse(model, "radial", dense_steps=0)
    noise = torch.randn(1, 4, 8, 8)
    assert torch.equal(run(patcher, noise=noise), run(None, model, noise=noise))
    (problem,) = report(patcher).problems
    assert "radial" in problem


def test_forwards_of_another_thread_run_without_the_methods():
    from concurrent.futures import ThreadPoolExecutor

    class Elsewhere(comfy.Wan):
        def forward(self, *args, **kwargs):
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(torch.inference_mode()(super().forward), *args, **kwargs).result()

    model = Elsewhere()
    patcher = sparse(model, dense_steps=0)
    assert torch.equal(run(patcher), run(None, model))
    assert len(report(patcher).problems) == 1


def test_blocks_that_are_left_out_begin_the_methods_anew(monkeypatch):
    forgotten = []
    monkeypatch.setattr(SparseDHandler, "reset", lambda self: forgotten.append(len(self.bits)) or self.bits.clear())

    class Shrinking(comfy.Wan):
        def forward_orig(self, x, timestep, context, options):
            blocks, self.blocks = self.blocks, self.blocks[1:] if timestep[0] < 0.5 else self.blocks
            try:
                return super().forward_orig(x, timestep, context, options)
            finally:
                self.blocks = blocks

    patcher = sparse(Shrinking(), "sparsed", "density = 0.3", dense_steps=0)
    run(patcher)
    assert any("anew" in note for note in report(patcher).notes)
    assert forgotten == [2, 1]  # when the first block left, and at the end


def test_an_error_of_the_model_goes_on_and_the_slot_is_left_as_it_was():
    class Failing(comfy.Wan):
        def forward_orig(self, x, timestep, context, options):
            raise RuntimeError("memory")

    patcher = sparse(Failing())
    with pytest.raises(RuntimeError, match="memory"):
        run(patcher)
    assert report(patcher) is not None


def test_a_model_whose_code_runs_no_wrapper_is_told():
    class Bare(comfy.Wan):
        def forward(self, *args, **kwargs):
            return self._forward(*args, **kwargs)

    patcher = sparse(Bare())
    run(patcher)
    (problem,) = report(patcher).problems
    assert "wrapper" in problem
    assert str(report(patcher)).count("\n") == 1
