"""What a perturbed branch costs: the arms, and the shares that the table tells."""

import guidance_cost as module
from dit_accel_eval.runs.results import append_line, read_lines
from guidance_cost import LAYERS, arms_of, main, table


def test_each_arm_has_a_plain_run_to_be_held_against(monkeypatch, tmp_path):
    seen = []

    def seconds(loaded, steps, call, methods):
        seen.append((call, methods))
        return float(len(methods) + 1)

    monkeypatch.setattr(module, "seconds_of", seconds)
    monkeypatch.setattr(module, "EmbeddedModel", lambda model, call: None)
    out = tmp_path / "cost.jsonl"
    assert main(["--models", "wan-plain", "--rounds", "2", "--out", str(out)]) == 0
    assert len(read_lines(out)) == 2
    assert len(seen) == 3 * len(arms_of("wan-plain"))
    full = [methods[0].share_prefix for call, methods in seen if methods and methods[0].name == "pag"]
    assert {True, False} == set(full)


def test_shares_are_taken_within_a_round(tmp_path, capsys):
    names = arms_of("wan-plain")
    for slow in (1.0, 5.0):  # another load of the machine
        seconds = {name: slow * (2.0 if name.startswith("plain") else 3.0) for name in names}
        seconds |= {f"shared {layer}": slow * (3.0 - layer / 6) for layer in LAYERS["wan-plain"]}
        line = {"model": "wan-plain", "steps": 4, "threads": 1, "processor": "p", "seconds": seconds}
        append_line(tmp_path / "cost.jsonl", line)
    told = table(read_lines(tmp_path / "cost.jsonl"))
    assert "| a whole third forward | 50.0 % [50.0, 50.0] |" in told
    assert "| begun at that block | 50.0 % [50.0, 50.0] | 41.7 % [41.7, 41.7] | 33.3 %" in told
    assert "Free mode adds 50.0 % [50.0, 50.0]" in told
    assert main(["--table", "--out", str(tmp_path / "cost.jsonl")]) == 0
    assert capsys.readouterr().out.strip() == told.strip()
