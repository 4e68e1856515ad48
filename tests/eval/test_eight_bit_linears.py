"""The study of linear layers in eight bits: what it quantises, its table, its committed lines; int8 needs torchao."""

import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import eight_bit_linears
import pytest
import torch
from dit_accel_eval.runs.loaded import EmbeddedModel, weights_hash
from torch import nn

ROOT = Path(__file__).parents[2]
LINES = [json.loads(line) for line in (ROOT / "eval/results/eight-bit-linears.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_line_for_each_layer_kind_and_method(monkeypatch):
    def reference(model, clip, _):
        return SimpleNamespace(frames=model.run(clip, steps=2, solver="unipc").frames)

    monkeypatch.setattr(eight_bit_linears, "reference_run", reference)
    monkeypatch.setattr(eight_bit_linears, "LINEARS", ("plain", "fp8"))
    found = [*eight_bit_linears.measure(Namespace(model="wan-plain", first_clip=3, clips=1, steps=2), [])]
    assert [(line["linears"], line["method"]) for line in found] == [
        ("plain", "dense"), ("plain", "seacache"), ("fp8", "dense"), ("fp8", "seacache")
    ]  # fmt: skip
    plain, eight = found[0], found[2]
    assert plain["psnr"] == plain["to_plain"] == found[1]["to_plain"] == 100
    assert 10 < eight["psnr"] == eight["to_plain"] < 60
    row = f"| fp8 | dense | 1 | {eight['psnr']:.2f} | {eight['to_plain']:.1f} | {eight['psnr'] - 100:+.2f} "
    assert row in eight_bit_linears.table(found)


def test_fp8_rounds_each_row_by_its_largest_number():
    torch.manual_seed(0)
    rows = torch.randn(5, 64) * torch.logspace(-6, 6, 5)[:, None]
    found = eight_bit_linears.rounded(rows)
    error = (found - rows).abs() / rows.abs().amax(-1, keepdim=True)
    assert 1e-3 < float(error.amax(-1).min()) <= float(error.max()) <= 2**-4
    largest = rows.abs().argmax(-1, keepdim=True)
    assert torch.allclose(found.gather(-1, largest), rows.gather(-1, largest), rtol=1e-6)
    assert not eight_bit_linears.rounded(torch.zeros(2, 8)).any()


def test_int8_quantises_the_blocks_alone_unless_all_is_asked():
    pytest.importorskip("torchao", reason="torchao is not installed")
    for kind, blocks_alone in (("int8", True), ("int8, all layers", False), ("weight-only int8", True)):
        transformer = EmbeddedModel("wan-plain", {}).pipe.transformer
        eight_bit_linears.quantise(transformer, kind)
        quantised = {
            name.startswith("blocks."): hasattr(part.weight, "qdata")
            for name, part in transformer.named_modules()
            if isinstance(part, nn.Linear)
        }
        assert quantised == {True: True, False: not blocks_alone}


def test_the_committed_lines_are_of_the_embedded_model():
    assert {line["weights"] for line in LINES} == {weights_hash("wan-tiny")}
    seen = {(line["linears"], line["method"], line["clip"]) for line in LINES}
    clips = range(16, 20)  # choosing clips
    assert seen == {(a, b, c) for a in eight_bit_linears.LINEARS for b in eight_bit_linears.METHODS for c in clips}
