"""Every single head and pair beside HeadHunter's: what is judged, what goes on, what the table says."""

import every_set as module
import pytest
from dit_accel_eval.runs.results import read_lines
from every_set import Judged, Setting, hunted, method_of, run, sets_of, table

from dit_accel import PAG, SLG, ConfigError, SoftPAG

HEADS = [f"L{layer}H{head}" for layer in range(3) for head in range(2)]
WORTH = dict(zip(HEADS, [0.1, 0.3, 0.0, 0.25, 0.2, 0.05], strict=True))
SETTING = Setting(model="flux-tiny", prompts=2, steps=8, held_out=3)


@pytest.fixture
def made(monkeypatch):
    """Every picture that is made, of which each head adds its worth to the closeness; pairs of L0H1 add less."""
    asked = []

    def make(self, name, clip):
        asked.append((name, clip))
        steps = self.setting.steps
        heads = name.split("+") if name.startswith("L") else []
        close = 0.2 + sum(WORTH[head] for head in heads) - 0.28 * (len(heads) == 2 and "L0H1" in heads)
        close += {"pag L1 3.0": 0.1, "slg L2 1.0": 0.2}.get(name, 0.0) + 0.001 * clip
        return {"set": name, "clip": clip, "steps": steps, **self._about, "forwards": steps, "closeness": close}

    monkeypatch.setattr(Judged, "_made", make)
    monkeypatch.setattr(module, "heads_of", lambda setting: HEADS)
    return asked


def test_all_sets_are_judged_once_and_a_run_goes_on(made, tmp_path):
    out = tmp_path / "lines.jsonl"
    run(Judged(SETTING, out))
    assert len(made) == len(set(made)) == len(read_lines(out))
    singles, pairs, layers = sets_of(HEADS)
    assert (len(singles), len(pairs), len(layers)) == (6, 15, 2 * 3)
    assert {name for name, _ in made} >= {*singles, *pairs, *layers, "none"}
    before = list(made)
    run(Judged(SETTING, out))
    assert made == before
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:-3]))
    run(Judged(SETTING, out))
    assert len(made) == len(before) + 3


def test_the_table_tells_the_rank_of_what_was_selected_and_the_forwards(made, tmp_path):
    judged = Judged(SETTING, tmp_path / "lines.jsonl")
    run(judged)
    found, asked = hunted(judged, HEADS)
    assert found[0] == "L0H1"  # the best single head, which no best pair holds
    told = table(judged)
    assert "| HeadHunter's first head | L0H1 | 1 of 6 |" in told
    assert "| best pair | L1H1+L2H0 | 1 of 15 |" in told
    rank = sorted(sets_of(HEADS)[1], key=judged.tuning, reverse=True).index(found[1]) + 1
    assert f"| HeadHunter's two heads | {found[1]} | {rank} of 15 |" in told
    assert "| best pag layer | pag L1 3.0 |" in told
    assert "| best slg layer | slg L2 1.0 |" in told
    every, hunt = (6 + 15) * 2 * 8, sum(line["forwards"] for line in asked)
    assert f"HeadHunter ran {hunt} forwards for its two rounds, all heads and pairs take {every}: " in told


def test_a_table_of_an_unfinished_run_names_what_is_lacking(made, tmp_path):
    with pytest.raises(ConfigError, match=r"set L0H0.*clip 64.*8 steps.*--table"):
        table(Judged(SETTING, tmp_path / "lines.jsonl", generate=False))


def test_names_stand_for_methods():
    assert method_of("none") is None
    assert method_of("L0H1+L2H0") == SoftPAG(heads=("L0H1", "L2H0"), u=1.0)
    assert method_of("pag L3 1.0") == PAG(layers="L3", scale=1.0)
    assert method_of("slg L3 3.0") == SLG(layers="L3", scale=3.0, start=0.0, stop=1.0)
