"""The kernel backend fa4 where it is named: what attach says when it is missing or a method needs votes."""

import fa4_stand_in
import pytest
import torch
from wan_tiny import tiny_transformer

import dit_accel


def test_a_machine_that_cannot_run_it_is_told_why(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    with pytest.raises(dit_accel.MissingBackend, match=r"'fa4'.*sm_90.*sm_100 \(found cpu\)"):
        dit_accel.attach(tiny_transformer(), dit_accel.RadialAttention(), backend="fa4")


def test_methods_that_vote_are_refused_by_name(monkeypatch):
    fa4_stand_in.install(monkeypatch, "sm_90")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(dit_accel.MissingBackend, match=r"'fa4'.*votes.*lite.*'auto'"):
        dit_accel.attach(tiny_transformer(), dit_accel.LiteAttention(), backend="fa4")
