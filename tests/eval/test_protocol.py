"""The protocol: its prompts, its numbers of clips, and the command that prints them."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dit_accel_eval import protocol
from dit_accel_eval.protocol import chance, clips_for, committed, prompts_in_order
from dit_accel_eval.report.writing import page
from dit_accel_eval.runs.loaded import CARD, card_state
from dit_accel_eval.runs.results import read_lines, result_lines
from dit_accel_eval.statistics import judge, p_value, p_values
from dit_accel_eval.suites.figures import Comparison
from fake_model import command, refuses, report_of, written
from scipy.stats import norm

RESULTS = Path(__file__).parents[2] / "eval" / "results"
NORMAL = norm.ppf((np.arange(400) + 0.5) / 400)  # differences of spread 1 without skewness


def leads_of(path: Path) -> dict[str, list[float]]:
    lines = result_lines(path)
    comparison = Comparison(lines)
    arms = {line.arm: [round(lead, 2) for lead in comparison.leads(line.arm, "work").values()] for line in lines}
    return {arm: leads for arm, leads in arms.items() if len(leads) >= 6}


def test_no_prompt_both_chooses_and_judges_and_every_start_is_even():
    choosing, judging = map(prompts_in_order, ("choosing", "judging"))
    assert (len(choosing), len(judging), len({*choosing, *judging})) == (16, 48, 64)
    groups = protocol.protocol_prompts("judging")
    assert len(groups) == 8
    for start in (8, 16, 24):
        assert {sum(prompt in group for prompt in judging[:start]) for group in groups.values()} == {start // 8}


def test_the_chance_is_that_of_the_verdict_itself():
    leads, draws = committed()[2].leads, np.random.default_rng(0)
    apart = (np.array(leads) - np.mean(leads)) * np.sqrt(len(leads) / (len(leads) - 1))
    drawn = 3.0 + draws.choice(apart, (200, 24))
    verdicts = [judge({"arm": row})["arm"].verdict for row in drawn]
    assert np.mean([verdict == "ahead" for verdict in verdicts]) == chance(leads, 3.0, 24, draws=200)
    assert p_values(drawn).tolist() == [p_value(row) for row in drawn]


def test_smaller_leads_and_more_arms_take_more_clips():
    spread = committed()[2].leads
    counts = [clips_for(spread, lead) for lead in (10.0, 5.0, 2.0)]
    assert counts == sorted(counts)
    assert clips_for(spread, 5.0, arms=8) > clips_for(spread, 5.0)
    assert clips_for(spread, 0.01) is None
    assert chance(NORMAL, 0.0, 24) < 0.06


@pytest.mark.parametrize("spread", committed(), ids=lambda spread: spread.results)
def test_the_spreads_are_those_of_committed_results(spread):
    assert protocol.typical(spread.results, leads_of(RESULTS / f"{spread.results}.jsonl")) == spread


def test_the_command_prints_rules_prompts_and_clips():
    assert f"version {protocol.PROTOCOL}" in command("protocol").stdout
    assert command("protocol", "--prompts", "judging").stdout.splitlines() == [*prompts_in_order("judging")]
    data = json.loads(command("protocol", "--json").stdout)
    assert (data["version"], len(data["rules"])) == (protocol.PROTOCOL, 13)
    path = RESULTS / "frontier-wan-tiny.jsonl"
    for options in ((), ("--results", path)):
        found = json.loads(command("protocol", "--see", 3, "--arms", 4, *options, "--json").stdout)[-1]
        assert found["clips"]["3"] == clips_for(committed()[2].leads, 3.0, arms=4)
    assert f"over {protocol.COUNTS[-1]}" in command("protocol", "--see", 0.1).stdout


def test_the_clocks_of_a_card_are_told(monkeypatch, tmp_path):
    said = "1755 MHz, 1980 MHz, 2619 MHz, 700.00 W, 580.95"
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\n[ $2 = GPU-1234 ] && echo '{said}'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    state = card_state(torch.device("cuda"))
    assert state == dict(zip(CARD, said.split(", "), strict=True))
    assert card_state(torch.device("cpu")) == {}
    lines = read_lines(RESULTS / "frontier-wan-tiny.jsonl")[:30]
    for number, line in enumerate(lines):
        line["card"] = state | ({"clocks.sm": "990 MHz"} if number % 2 else {})
    report = report_of(written(tmp_path / "r.jsonl", lines))
    assert "clocks.sm 990 MHz to 1755 MHz; clocks.max.sm 1980 MHz;" in page(report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompts", "judge"), "did you mean 'judging'"),
        (("--prompts", "judging", "--see", 1), "--prompts and --see"),
        (("--arms", 3), "add, say, --see 1"),
        (("--see", 0), "above 0 dB, got 0"),
        (("--see", 1, "--results", "none.jsonl"), "none.jsonl can't be read"),
    ],
)
def test_options_that_say_nothing_are_refused(options, message):
    refuses(message, "protocol", *options)
