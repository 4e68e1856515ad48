"""What "auto" takes: kernels that are wrong are refused by the self check, slow ones lose the race, files are kept."""

import importlib.metadata
import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import product

import pytest
import torch
from dit_accel_kernels import BACKENDS, TileLists, backend_of_last_call, decisions, speed_of_dense_by, speed_over_dense
from dit_accel_kernels.backends.torch.compiled import cache_folder
from dit_accel_kernels.choice import candidates, measured, race, self_check
from dit_accel_kernels.choice.candidates import CANDIDATES, Candidate
from dit_accel_kernels.choice.self_check import Kind
from kernel_cases import attend, qkv, random_lists

CPU = torch.device("cpu")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RIGHT = CANDIDATES["gather"].attend


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """A cache of the test's own, and nothing known from calls before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(race.SWITCH, raising=False)
    monkeypatch.setattr(race, "LEAST_FLOPS", 0.0)
    monkeypatch.setattr(race, "_said", {})
    monkeypatch.setattr(race, "_decided", {})
    for cached in (race.measured, race.speed_of_dense_by):
        cached.cache_clear()
    yield tmp_path
    for cached in (race.measured, race.speed_of_dense_by):
        cached.cache_clear()


def only(monkeypatch, **ones):
    """Let these be all candidates beside torch's gather, which stays the last of ours."""
    for name in CANDIDATES:
        if name != "gather":
            monkeypatch.setitem(CANDIDATES, name, Candidate(lambda x: "it is not tried here", RIGHT))
    for name, attend_by in ones.items():
        monkeypatch.setitem(CANDIDATES, name, Candidate(lambda x: None, attend_by))
    monkeypatch.setattr(race, "OURS", (*ones, "gather"))


def kind(*features, dtype=torch.float32, dim=16, tile=(64, 64)):
    return Kind(CPU, dtype, dim, dim, tile, frozenset(features))


def changed(**changes):
    """A kernel that leaves some of a call out."""
    return lambda problem: RIGHT(replace(problem, **changes))


def ignoring_lists(problem):
    full = TileLists.full(problem.num_q, problem.num_k, block_q=problem.block_q, block_k=problem.block_k)
    return RIGHT(replace(problem, **full.parts))


def one_list_for_all_heads(problem):
    first = TileLists(**problem.parts, **problem.sizes).states()[:1]
    return RIGHT(replace(problem, **TileLists.from_states(first, **problem.sizes).parts))


def output(change):
    def run(problem):
        out, *others = RIGHT(problem)
        return change(out, problem), *others

    return run


def nan_in_tail(out, problem):
    out[:, :, -(problem.num_q % problem.block_q) :] = torch.nan
    return out


def without_zeroing(out, problem):
    out[:, :, : problem.block_q] = 1e-2
    return out


def base_two(problem):
    out, lse, *others = RIGHT(problem)
    return out, lse / torch.log(torch.tensor(2.0)), *others


def voting_all_down(problem):
    *others, kept = RIGHT(problem)
    return *others, torch.zeros_like(kept)


def mixed_key_heads(problem):
    repeat = problem.q.shape[1] // problem.k.shape[1]
    return RIGHT(replace(problem, k=problem.k.repeat(1, repeat, 1, 1).flip(-1), v=problem.v.repeat(1, repeat, 1, 1)))


def raising(error):
    def run(problem):
        raise error

    return run


PLANTS = {
    "ignores its lists": (ignoring_lists, ()),
    "takes the first head's lists for all": (one_list_for_all_heads, ()),
    "off by 1 %": (output(lambda out, _: out * 1.01), ()),
    "NaN in the ragged tail": (output(nan_in_tail), ()),
    "rows without keys are not 0": (output(without_zeroing), ()),
    "another shape": (output(lambda out, _: out[:, :, :-1]), ()),
    "LSE to base 2": (base_two, ("LSE",)),
    "crash at compile": (raising(RuntimeError("no such target")), ()),
    "crash at run": (output(lambda out, _: out[:, 7]), ()),
    "no memory": (raising(torch.OutOfMemoryError("8 GiB")), ()),
    "drops pooled tiles": (changed(pooled_offsets=None, pooled_indices=None), ("pooled tiles",)),
    "ignores masks in tiles": (changed(mask_ids=None, mask_bits=None), ("masks in tiles",)),
    "ignores decay": (changed(decay=None), ("decay",)),
    "ignores scales of heads": (changed(head_scale=None), ("scales of heads",)),
    "sees hidden keys": (changed(key_valid=None), ("hidden keys",)),
    "mixes key heads": (mixed_key_heads, ("shared key heads",)),
    "votes all tiles down": (voting_all_down, ("votes", "selection")),
}


@pytest.mark.parametrize(("name", "dtype"), list(product(PLANTS, DTYPES)))
def test_a_planted_wrong_kernel_is_refused_by_its_check_and_a_right_one_passes(name, dtype):
    plant, features = PLANTS[name]
    of = kind(*features, dtype=DTYPES[dtype])
    assert self_check.fault(of, RIGHT) is None
    assert self_check.fault(of, plant)


def test_a_kernel_that_hangs_is_left_after_its_time(monkeypatch):
    monkeypatch.setattr(self_check, "SECONDS", 0.2)
    ended = threading.Event()
    assert "took more than" in self_check.fault(kind(), lambda problem: ended.wait(60))
    ended.set()


def test_the_sample_has_what_the_check_promises():
    of = kind("LSE", "shared key heads", tile=(128, 64))
    problem = self_check.sample(of)
    states = TileLists(**problem.parts, **problem.sizes).states()
    assert 900 < problem.num_q < 1100
    assert problem.num_q % 128
    assert problem.num_k % 64
    assert not torch.equal(states[0], states[1])
    assert (states[:, 0] == 0).all()
    assert (states[:, 1] == 2).sum() == 2
    assert self_check.kind_of(problem) == of
    before = torch.get_rng_state()
    self_check.sample(of)
    assert torch.equal(torch.get_rng_state(), before)


CALL = (1, 2, 2, 256, 256, 16, torch.float32)


def run(**more):
    torch.manual_seed(1)
    return attend(*qkv(*CALL), random_lists(2, 256, 256, 64, 64, pooled=False), **more)


def test_the_faster_of_those_that_pass_wins_and_is_kept_and_the_wrong_one_never_runs(monkeypatch, fresh):
    seen = []

    def slow(problem):
        time.sleep(0.02)
        return RIGHT(problem)

    def wrong(problem):
        seen.append(problem.num_q)
        return ignoring_lists(problem)

    only(monkeypatch, slow=slow, wrong=wrong)
    expected = run(backend="gather")
    assert torch.equal(run(), expected)
    assert backend_of_last_call() == "gather"
    assert set(seen) == {self_check.sample(kind()).num_q}  # its check alone
    said = "\n".join(decisions())
    assert "wrong, float32" in said
    assert "does not follow its lists" in said
    assert "gather, " in said
    assert "slow " in said
    race.measured.cache_clear()  # another process
    race._decided.clear()
    monkeypatch.setattr(race, "raced", lambda *_: pytest.fail("raced again"))
    run()
    assert backend_of_last_call() == "gather"
    kept = [json.loads(path.read_text()) for path in cache_folder().glob("measured-*.json")]
    assert len(kept) == 1
    assert kept[0]["machine"] == candidates.machine(CPU)


@pytest.mark.parametrize("text", ["{", "[]", '{"machine": "another", "kept": {"x": 1}}', '{"machine": 3}'])
def test_a_file_that_is_cut_short_or_anothers_counts_as_none(fresh, text):
    kept = measured.Measured("this one")
    kept["x"] = 2
    (path,) = cache_folder().glob("measured-*.json")
    path.write_text(text)
    with pytest.warns(UserWarning, match="as none"):
        assert measured.Measured("this one")["x"] is None


def test_what_two_processes_measure_is_kept_side_by_side_and_no_permission_loses_nothing(fresh, monkeypatch):
    first, second = measured.Measured("m"), measured.Measured("m")
    first["a"], second["b"] = 1, 2
    third = measured.Measured("m")
    assert (third["a"], third["b"]) == (1, 2)
    monkeypatch.setattr(measured.tempfile, "TemporaryDirectory", lambda **_: raising(PermissionError("read-only"))(0))
    with pytest.warns(UserWarning, match="read-only"):
        third["c"] = 3
    assert third["c"] == 3
    monkeypatch.setattr(measured, "cache_folder", lambda: raising(OSError("belongs to user 7"))(0))
    with pytest.warns(UserWarning, match="user 7"):
        assert measured.Measured("m")["a"] is None


def test_a_check_that_ended_the_process_is_not_tried_again(monkeypatch):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    monkeypatch.setitem(CANDIDATES, "x", Candidate(lambda x: None, RIGHT, package="no-such-package"))
    of = kind()
    race.measured(CPU)[f"x , {of}".replace(" ,", ",")] = f"{race.TRIED} {gone.pid}"
    assert "ended the process" in race.refused("x", of)
    assert "ended the process" in race.refused("x", of, again=True)
    race.measured(CPU)[f"x , {kind('LSE')}".replace(" ,", ",")] = f"{race.TRIED} 1"  # which lives
    assert race.refused("x", kind("LSE")) is None
    monkeypatch.setitem(CANDIDATES, "x", Candidate(lambda x: None, ignoring_lists, package="no-such-package"))
    assert race.refused("x", kind("LSE")) is None
    assert "follow its lists" in race.refused("x", kind("LSE"), again=True)


def test_a_race_before_any_call_decides_for_calls_of_its_class(monkeypatch):
    only(monkeypatch, right=RIGHT)
    monkeypatch.setitem(CANDIDATES, "late", Candidate(lambda x: None, RIGHT, waits=True))
    monkeypatch.setitem(CANDIDATES, "card", Candidate(lambda x: None, RIGHT, on=("cuda",)))
    assert [race.lacks(name, kind()) for name in ("right", "card")] == [None, "needs a device of type cuda"]
    seconds = {"right": 1.5, "late": 1.0, "dense": 8.0}
    monkeypatch.setattr(race, "timed", lambda calls, problem: {name: seconds.get(name, 2.0) for name in calls})
    x = torch.randn(1, 2, 1000, 16)
    assert race.race_of(x, x, x, 0.25, whole=False)["name"] == "right"
    kept = race.race_of(x, x, x, 0.25, whole=True)
    assert (kept["name"], kept["share"]) == ("late", 8 * kept["density"])
    assert 0.2 < kept["density"] < 0.35
    assert race.races(CPU) == [kept]
    monkeypatch.setattr(race, "raced", lambda *_: pytest.fail("raced again"))
    states = 2 * torch.eye(8, dtype=torch.uint8)[None]
    lists = TileLists.from_states(states + states.roll(1, 1), block_q=128, block_k=128, num_q=1000, num_k=1000)
    attend(x, x, x, lists, layout="bhsd")
    assert backend_of_last_call() == "late"


def test_nothing_is_measured_where_it_must_not_be(monkeypatch):
    monkeypatch.setattr(race, "raced", lambda *_: pytest.fail("raced"))
    only(monkeypatch, right=RIGHT)
    torch.use_deterministic_algorithms(True)
    try:
        run()
        assert backend_of_last_call() == "right"
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(race, "capturing", lambda device: True)
    monkeypatch.setattr(race, "fault", lambda *_, **__: pytest.fail("checked in a captured graph"))
    run()
    monkeypatch.setenv(race.SWITCH, "0")
    monkeypatch.setattr(race, "capturing", lambda device: False)
    run()
    assert speed_of_dense_by(CPU, torch.float32, 16) is None
    monkeypatch.delenv(race.SWITCH)
    monkeypatch.setattr(race, "LEAST_FLOPS", 1e12)
    monkeypatch.setattr(race, "fault", lambda *_, **__: None)
    run()
    q, k, v = qkv(*CALL)
    assert speed_over_dense(q, k, v, random_lists(2, 256, 256, 64, 64), layout="bhsd") is None


def test_of_several_processes_all_do_what_the_first_finds(monkeypatch):
    store, rank = torch.distributed.HashStore(), [0]
    for name, value in (("is_initialized", lambda: True), ("get_world_size", lambda: 2), ("get_rank", lambda: rank[0])):
        monkeypatch.setattr(race.dist, name, value)
    monkeypatch.setattr(race.dist.distributed_c10d, "_get_default_store", lambda: store)
    only(monkeypatch, right=RIGHT)
    monkeypatch.setattr(race, "raced", lambda *_: {"name": "gather", "share": 1.0, "why": "gather"})
    run()
    rank[0] = 1
    race._decided.clear()
    (key,) = (key for key in race._said if "tokens" in key)
    race.measured(CPU)[key] = {"name": "right", "share": 1.0, "why": "what this process measured once"}
    run()
    assert backend_of_last_call() == "gather"
    monkeypatch.setattr(race, "WAIT", 0.1)
    attend(*qkv(1, 2, 2, 256, 256, 32, torch.float32), random_lists(2, 256, 256, 64, 64))
    assert backend_of_last_call() == "right"
    assert any("said nothing" in line for line in decisions())


def test_speed_over_dense_is_that_of_the_winner_and_falls_with_density(monkeypatch):
    times = {"right": 2.0, "gather": 3.0, "dense": 1.0}
    monkeypatch.setattr(race, "timed", lambda calls, problem: {name: times[name] for name in calls})
    only(monkeypatch, right=RIGHT)
    q, k, v = qkv(*CALL)
    lists = random_lists(2, 256, 256, 64, 64, pooled=False)
    assert speed_over_dense(q, k, v, lists, layout="bhsd") == pytest.approx(0.5)
    assert speed_over_dense(q, k, v, lists, layout="bhsd", backend="gather") is None
    assert speed_of_dense_by(CPU, torch.float32, 16) == ("right", pytest.approx(0.5))
    times["right"] = 0.1
    assert speed_over_dense(q, k, v, lists, layout="bhsd") == pytest.approx(0.5)  # measured once


def test_who_fails_or_has_no_memory_loses_the_race_and_all_others_run(monkeypatch):
    turns = []

    def later(problem):
        if problem.num_q == 256:
            turns.append(1)
            raise torch.OutOfMemoryError("8 GiB")
        return RIGHT(problem)

    only(monkeypatch, later=later)
    run()
    assert backend_of_last_call() == "gather"
    assert turns == [1]
    assert any("8 GiB" in line for line in decisions())


def test_the_part_that_is_timed_has_few_heads_where_they_share_lists(monkeypatch):
    from dit_accel_kernels import Selection
    from dit_accel_kernels.problem import Problem

    q, k, v = qkv(2, 8, 8, 256, 256, 16, torch.float32)
    lists = random_lists(1, 256, 256, 64, 64, pooled=False)
    keep = Selection(keep=torch.full((2, 8, 4, 1), -1, dtype=torch.int32))
    call = Problem(q=q, k=k, v=v, **lists.parts, block_q=64, block_k=64, scale=0.25, heads_first=True, selection=keep)
    call = replace(call, head_scale=torch.ones(1, 8), key_length=torch.tensor([256, 200]))
    monkeypatch.setattr(race, "SLICE_FLOPS", 3.0 * 4 * 256 * 256 * 16)
    small = race.part(call)
    assert small.q.shape == small.v.shape == (1, 3, 256, 16)
    assert small.selection.keep.shape == (1, 3, 4, 1)
    assert small.head_scale.shape == (1, 3)
    assert small.key_length.tolist() == [256]
    assert race.part(replace(call, **random_lists(8, 256, 256, 64, 64).parts)).q.shape == q.shape
    out, *_ = RIGHT(small.tiled())
    assert torch.equal(out, RIGHT(replace(call, q=q[:1], k=k[:1], v=v[:1], key_length=call.key_length[:1],
                                          selection=Selection(keep=keep.keep[:1])).tiled())[0][:, :3])  # fmt: skip


def test_a_copy_of_the_package_that_is_no_distribution_measures_too(monkeypatch):
    monkeypatch.setattr(candidates.importlib.metadata, "version", raising(importlib.metadata.PackageNotFoundError()))
    candidates.machine.cache_clear()
    assert "torch" in candidates.machine(CPU)
    candidates.machine.cache_clear()


def test_every_candidate_can_be_named():
    assert ("auto", *CANDIDATES) == BACKENDS
