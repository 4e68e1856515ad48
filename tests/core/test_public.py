"""The public face: what names there are, how things show themselves, and what is refused before anything is touched."""

import ast
import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from wan_tiny import tiny_transformer

import dit_accel
from dit_accel import ConfigError, MissingBackend, RadialAttention
from dit_accel.public import HOMES

RADIAL = RadialAttention(block_size=16, decay_factor=0.2, near="half", sink=False, dense_steps=0, dense_layers=0)


def forward(model):
    with torch.no_grad(), model.cache_context("cond", step_index=0, num_inference_steps=4):
        torch.manual_seed(0)
        return model(
            torch.randn(1, 12, 5, 8, 8), timestep=torch.tensor([500]), encoder_hidden_states=torch.randn(1, 6, 64)
        )


def test_public_names_are_listed_and_typos_are_not_swallowed():
    some = {"attach", "attachment_of", "describe", "recommend", "RadialAttention", "SparseD", "TokenLayout"}
    assert {*some, "__version__"} <= set(dir(dit_accel))
    assert dit_accel.__version__.count(".") >= 1
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        dit_accel.atach  # noqa: B018


def test_the_names_are_those_of_the_stub():
    stub = ast.parse(Path(dit_accel.__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    assert {name.name: node.module for node in stub if isinstance(node, ast.ImportFrom) for name in node.names} == HOMES
    assert all(getattr(dit_accel, name).__name__ == name for name in HOMES)


def test_a_type_checker_sees_a_misspelt_name(tmp_path):
    pytest.importorskip("pyright")
    (tmp_path / "use.py").write_text("import dit_accel\n\ndit_accel.attach\ndit_accel.__version__\ndit_accel.atach\n")
    found = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, str(tmp_path / "use.py")],
        capture_output=True, text=True, check=False,
    ).stdout  # fmt: skip
    errors = [line for line in found.splitlines() if " error: " in line]
    assert len(errors) == 1
    assert '"atach" is not a known attribute' in errors[0]


def test_reports_and_attachments_show_themselves_in_a_line():
    transformer = tiny_transformer()
    with dit_accel.attach(transformer, RADIAL) as attachment:
        assert repr(attachment.report()) == "<Report: radial; 0 calls, density 1.000>"
        assert "nothing has run yet" in str(attachment.report())
        forward(transformer)
        report = attachment.report()
        assert len(repr(report)) < 100


@pytest.mark.parametrize(
    ("methods", "options", "error", "match"),
    [
        ([RADIAL], dict(backend=None), MissingBackend, r"backend None.*auto, fa4, flex"),
        ([RADIAL], dict(backend="torhc"), MissingBackend, r"backend 'torhc'.*'torch'\?"),
        ([RADIAL], dict(backend=7), MissingBackend, "backend 7"),
        ([RadialAttention], {}, ConfigError, r"instance.*RadialAttention\(\)"),
        ([[RADIAL]], {}, ConfigError, r"attach\(pipe, \*configs\)"),
        (["radial"], {}, ConfigError, r"got 'radial'.*DBCache, DBPrune, DFA, DeltaAttention, EasyCache, FirstBlockCac"),
        ([RADIAL, RadialAttention()], {}, ConfigError, "two RadialAttention"),
    ],
)
def test_what_is_no_config_or_backend_is_refused(methods, options, error, match):
    transformer = tiny_transformer()
    with pytest.raises(error, match=match):
        dit_accel.attach(transformer, *methods, **options)
    assert dit_accel.attachment_of(transformer) is None


def test_fifty_times_on_and_off_leave_nothing_behind():
    transformer = tiny_transformer()
    before, held = {name: id(one) for name, one in transformer.attn_processors.items()}, []
    lite, cache = dit_accel.LiteAttention(block_size=16, dense_steps=0), dit_accel.EasyCache(threshold=0.1)
    for time in range(50):
        with dit_accel.attach(transformer, lite, *((cache, RADIAL) if time % 2 else (dit_accel.SLG(layers="L0"),))):
            forward(transformer)
        if time in (10, 30, 49):
            gc.collect()
            held.append(sum(type(one) is torch.Tensor for one in gc.get_objects()))
    assert max(held) == held[0], held
    assert {name: id(one) for name, one in transformer.attn_processors.items()} == before
    assert not [name for name in transformer.__dict__ if "dit_accel" in name]
