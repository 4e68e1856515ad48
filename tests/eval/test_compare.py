"""The comparison: metrics that know identity, honest intervals, suites that say what is wrong, a table that adds up."""

import json
from pathlib import Path

import numpy as np
import pytest
from dit_accel_eval.compare import main, read_lines, table
from dit_accel_eval.fidelity import psnr, ssim
from dit_accel_eval.paired import bootstrap
from dit_accel_eval.suite import read_suite

from dit_accel import ConfigError

SUITES = sorted((Path(__file__).parents[2] / "eval" / "suites").glob("*.toml"))
HEAD = 'version = 1\nname = "s"\nnum_frames = 5\nnum_inference_steps = 2\nguidance_scale = 1.0\nclips = 1\n'


def clip(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((3, 16, 16, 3), dtype=np.float32)


def test_metrics_of_identity_and_of_a_known_error():
    one = clip()
    assert psnr(one, one) == 100.0
    assert ssim(one, one) == pytest.approx(1.0)
    half = np.full_like(one, 0.5)
    assert psnr(half + 0.1, half) == pytest.approx(20.0, abs=1e-3)
    assert ssim(one, clip(1)) < 0.5
    with pytest.raises(ValueError, match="of one shape can be compared"):
        psnr(one, one[:2])


def test_interval_covers_its_level_of_the_time():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        interval = bootstrap(rng.normal(1.0, 1.0, 30), draws=500, seed=trial)
        hits += interval.low <= 1.0 <= interval.high
    assert 175 <= hits <= 199
    constant = bootstrap([2.0, 2.0])
    assert (constant.mean, constant.low, constant.high) == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap([])


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_committed_suites_read_and_match_their_results(path):
    suite = read_suite(path)
    assert suite.name == path.stem
    lines = read_lines(path.parent.parent / "results" / f"{suite.name}.jsonl")
    assert {line["arm"] for line in lines} <= {arm.name for arm in suite.arms}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD, r"lacks an \[\[arm\]\]"),
        (HEAD.replace("clips = 1\n", "") + '[[arm]]\nname = "a"', "lacks clips"),
        (HEAD + 'clip = 3\n[[arm]]\nname = "a"', r"unknown key 'clip'; did you mean 'clips'\?"),
        (HEAD.replace("version = 1", "version = 2"), "is not of version 1"),
        (HEAD + '[[arm]]\nname = "a"\n[[arm]]\nname = "a"', "two arms called 'a'"),
        (HEAD + '[[arm]]\nname = "abc"\nagainst = "abd"', r"is against 'abd'; did you mean 'abc'\?"),
        (HEAD + '[[arm]]\nname = "a"\nstep = 3', "has an unknown key 'step'"),
        (HEAD + '[[arm]]\nname = "a"\n[arm.radial]\ndecay = 1', "radial has no option 'decay'"),
        (HEAD + "[[arm]]\nstep = 3", "an arm without a name"),
        ("version", "is not valid TOML"),
    ],
)
def test_bad_suites_say_what_is_wrong(tmp_path, text, message):
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_suite(tmp_path / "s.toml")


def test_a_missing_suite_exits_with_2(tmp_path, capsys):
    assert main([str(tmp_path / "none.toml")]) == 2
    assert "no suite at" in capsys.readouterr().err


def test_what_a_selection_kept_is_measured(tmp_path, capsys):
    sol = "[arm.sol]\nblock_size = 16\ndense_steps = 0\nbeta = 0.5"
    path = tmp_path / "s.toml"
    path.write_text(HEAD + f'[[arm]]\nname = "sol"\n{sol}')
    out = tmp_path / "s.jsonl"
    assert main([str(path), "--threads", "1", "--out", str(out)]) == 0
    (line,) = read_lines(out)
    assert 0.3 < line["sparse_density"] < 0.6  # 12 tiles of 16: 24 % pinned, 31 % of the others on Gaussian scores
    assert line["density"] == pytest.approx((1 + 5 * line["sparse_density"]) / 6)
    captured = capsys.readouterr()
    assert f"{line['sparse_density']:.3f} of the sparse calls exact" in captured.err
    assert f"| sol | {line['density']:.3f} | {line['sparse_density']:.3f} |" in captured.out


@pytest.mark.slow
def test_a_tiny_suite_runs_resumes_and_pairs(tmp_path, capsys):
    radial = "[arm.radial]\nblock_size = 16\ndense_steps = 0\ndecay_factor = 0.2"
    (tmp_path / "suites").mkdir()
    path = tmp_path / "suites" / "s.toml"
    path.write_text(HEAD + f'[[arm]]\nname = "dense"\n[[arm]]\nname = "radial"\nagainst = "dense"\n{radial}')
    assert main([str(path), "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    results = tmp_path / "results" / "s.jsonl"
    lines = read_lines(results)
    assert [line["arm"] for line in lines] == ["dense", "radial"]
    assert lines[0]["psnr"] == 100.0
    assert lines[0]["density"] == 1.0
    assert lines[1]["psnr"] < 100.0
    assert lines[1]["density"] < 1.0
    assert main([str(path), "--threads", "1"]) == 0
    assert read_lines(results) == lines
    assert capsys.readouterr().out == printed
    results.write_text(results.read_text().replace(lines[0]["model"], "another"))
    assert main([str(path), "--threads", "1"]) == 2
    assert "holds results of model another" in capsys.readouterr().err
    difference = f"{lines[1]['psnr'] - 100:.2f}"
    assert f"| radial | {lines[1]['density']:.3f} | {lines[1]['sparse_density']:.3f} |" in printed
    assert f"| dense | {difference} [{difference}, {difference}] |" in printed


def test_fewer_steps_count_as_less_work():
    suite = read_suite(next(path for path in SUITES if path.stem == "radial-tiny"))
    line = dict(arm="12 steps", clip=0, psnr=20.0, ssim=0.5, color=True, shape=True, direction=False, density=1.0)
    line["sparse_density"] = None
    assert "| 12 steps | 0.600 |  | 20.00 [20.00, 20.00] | 0.500 | 100% / 100% / 0% |" in table(suite, [line])
    assert json.dumps(line)
