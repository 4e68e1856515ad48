"""The file of the compiled loop: who builds it, who may write it, and that nothing else is ever loaded."""

import ctypes
import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dit_accel_kernels import torch_way
from dit_accel_kernels.backends.torch import compiled, shipped
from kernel_cases import attend, qkv, random_lists

needs_compiler = pytest.mark.skipif(compiled.compiled_loop().library is None, reason="no C++ compiler is here")
posix = pytest.mark.skipif(not hasattr(os, "getuid"), reason="owners and modes of files are Unix's")
SOURCE = """
#include <cstdint>
#include <cstdio>
__attribute__((constructor)) void begun() { if (FILE* f = fopen("%s", "w")) fclose(f); }
extern "C" {
int64_t panel() { return 16; }
int64_t call_bytes() { return %s; }
int64_t has_pairs() { return 0; }
int64_t tile_words() { return 1; }
int64_t attend(void*) { return 0; }
%s
}
"""
KEYS = "int64_t pack() { return 0; }"


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache, for a loop that is looked for anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("CXX", compiled.SWITCH):
        monkeypatch.delenv(name, raising=False)
    compiled.compiled_loop.cache_clear()
    yield tmp_path / "cache" / "dit-accel" / "kernels"
    compiled.compiled_loop.cache_clear()


@pytest.fixture
def quick(fresh, monkeypatch, tmp_path):
    """A source that takes a fraction of the time, and a file that appears when it is loaded."""
    source, witness = tmp_path / "quick.cpp", tmp_path / "witness"
    source.write_text(SOURCE % (witness, ctypes.sizeof(compiled.LoopCall), KEYS))
    monkeypatch.setattr(compiled, "SOURCE", source)
    return fresh


def again() -> compiled.Loop:
    compiled.compiled_loop.cache_clear()
    return compiled.compiled_loop()


def name_of(loop: compiled.Loop) -> Path:
    assert loop.library is not None, loop.why
    return Path(loop.library._name)


def attends() -> bool:
    out = attend(*qkv(1, 1, 1, 40, 40, 8, torch.float32), random_lists(1, 40, 40, 8, 8), backend="torch")
    return bool(out.isfinite().all())


def written(path: Path, text: str) -> Path:
    """A program."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_without_a_compiler_or_by_the_switch_torch_computes_and_says_so(fresh, monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    monkeypatch.setenv(compiled.SWITCH, "0")
    assert compiled.compiled_loop().library is None
    assert torch_way(cpu, torch.float32) == "gathered tiles, since DIT_ACCEL_CPU_LOOP is 0"
    assert attends()
    monkeypatch.delenv(compiled.SWITCH)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert again().library is None
    assert torch_way(cpu, torch.float32) == "gathered tiles, since no C++ compiler was found (c++, g++, clang++)"
    assert attends()
    assert not fresh.exists()


@needs_compiler
def test_which_way_a_call_takes_is_told(quick):
    cpu = torch.device("cpu")
    assert compiled.compiled_loop().why == "compiled by c++"
    assert torch_way(cpu, torch.float32) == "loop compiled by c++"
    assert torch_way(cpu, torch.float64) == "gathered tiles, since the loop has no products of float64"
    assert torch_way(torch.device("cuda"), torch.float32) == "gathered tiles"


@needs_compiler
def test_cxx_may_hold_arguments(quick, monkeypatch, tmp_path):
    compiler = written(tmp_path / "mine", f'echo "$@" >> {tmp_path}/asked\nexec {shutil.which("c++")} "$@"')
    monkeypatch.setenv("CXX", f"{compiler} -DTHIS='1 2'")
    assert compiled.compiled_loop().why == "compiled by mine"
    asked = (tmp_path / "asked").read_text().splitlines()
    assert all(line.startswith("-DTHIS=1 2") for line in asked)
    assert asked[0].endswith("--version")


@pytest.mark.parametrize(
    ("named", "why"),
    [
        ("no-such-compiler -O1", ".CXX.*'no-such-compiler -O1', .*program 'no-such-compiler'"),
        ("g++ '", r""".CXX is "g\+\+ '", which .*: No closing quotation"""), ("false", ".*false: .*exit status 1"),
        ("broken", ".*fatal: no such"),
    ],
)  # fmt: skip
def test_a_named_compiler_that_does_not_work_is_warned_of_and_no_other_tried(fresh, monkeypatch, tmp_path, named, why):
    broken = written(tmp_path / "broken", '[ "$1" = --version ] && exit 0\necho "fatal: no such" >&2\nexit 1')
    monkeypatch.setenv("CXX", str(broken) if named == "broken" else named)
    with pytest.warns(UserWarning, match=rf"loop.*torch backend {why}") as warned:
        assert (compiled.compiled_loop().library, compiled.compiled_loop().library) == (None, None)
    assert len(warned) == 1
    assert compiled.compiled_loop().why.startswith("it could not be built (")
    assert attends()
    assert not fresh.exists() or list(fresh.iterdir()) == []


@needs_compiler
def test_without_cxx_the_next_compiler_is_tried(quick, monkeypatch, tmp_path):
    real = shutil.which("c++")
    written(tmp_path / "c++", "exit 1")
    written(tmp_path / "g++", f'exec {real} "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert again().why == "compiled by g++"


@needs_compiler
def test_the_packages_own_library_is_taken_where_it_fits(quick, monkeypatch):
    """The best one that a processor has instructions for; else, and where CXX names a compiler, what is built."""
    built, processor = name_of(compiled.compiled_loop()), ["flags : fpu"]
    monkeypatch.setattr(compiled, "processor_text", lambda: processor[0])
    paths = {kind: shipped.path_of(kind, compiled.SOURCE) for kind in shipped.KINDS}
    paths["avx2"].parent.mkdir()
    paths["avx2"].write_bytes(b"for another system")
    processor[0] = f"flags : {' '.join(shipped.AVX2)}"
    assert again().why == "compiled by c++"
    paths["avx2"].unlink()
    for path in paths.values():
        shutil.copy(built, path)
    for kind, (_, needed) in shipped.KINDS.items():
        processor[0] = f"model name : x\nflags : fpu {' '.join(needed)}"
        assert (name_of(again()), again().why) == (paths[kind], f"of the package, for {kind}")
        processor[0] = f"model name : {needed[-1]}\nflags : fpu {' '.join(needed[:-1])}"
        assert name_of(again()) != paths[kind]
    assert again().why == "compiled by c++"
    processor[0] = f"flags : {' '.join(shipped.AVX2)}"
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "c++")
        assert again().why == "compiled by c++"
    assert name_of(again()) == paths["avx2"]
    compiled.SOURCE.with_name("more.h").write_text("// another source than it was built from")
    assert again().why == "compiled by c++"


@needs_compiler
def test_a_damaged_file_is_never_loaded_but_built_anew(quick, tmp_path):
    """An end that is missing ended the process, by SIGBUS, or the loop for good."""
    path, second = name_of(compiled.compiled_loop()), tmp_path / "second"
    good = path.read_bytes()
    for damaged in (b"", good[: len(good) // 2], b"\x7fELF" + bytes(5000), good[:-1] + bytes([good[-1] ^ 1])):
        second.write_bytes(damaged)
        second.chmod(0o700)
        os.replace(second, path)
        assert not compiled.whole(path)
        assert name_of(again()) == path
        assert path.read_bytes() == good
        assert list(quick.iterdir()) == [path]


@needs_compiler
def test_a_planted_file_does_not_run(quick, tmp_path):
    path, source, made = name_of(compiled.compiled_loop()), tmp_path / "planted.cpp", tmp_path / "planted.so"
    source.write_text(SOURCE % (tmp_path / "it ran", ctypes.sizeof(compiled.LoopCall), KEYS))
    subprocess.run(["c++", "-shared", "-fPIC", str(source), "-o", str(made)], check=True)
    for digest, mode in (("0" * compiled.DIGITS, 0o700), (compiled._digest(made.read_bytes()), 0o770)):
        planted = Path(shutil.copy(made, quick / f"fused-{path.stem.split('-')[1]}-{digest}.so"))
        planted.chmod(mode)  # of another digest, or for others to write
        path.unlink()
        assert name_of(again()) == path  # built anew
        assert list(quick.iterdir()) == [path]
        assert not (tmp_path / "it ran").exists()


@needs_compiler
@posix
def test_what_belongs_to_somebody_else_is_not_loaded(quick, monkeypatch):
    path = name_of(compiled.compiled_loop())
    assert compiled.whole(path)
    for trusts_folders in (True, False):
        monkeypatch.setattr(compiled, "_trusted_owner", lambda x, y=trusts_folders: stat.S_ISDIR(x.st_mode) == y)
        assert compiled.whole(path) is not trusts_folders
    with pytest.warns(UserWarning, match=r"loop.*user \d+.*XDG_CACHE_HOME"):
        assert again().library is None
    moved = path.rename(path.with_suffix(".moved"))
    path.symlink_to(moved)
    assert not compiled.whole(path)


@posix
def test_owners_and_folders_that_are_open_to_others(monkeypatch):
    """User 7: a group of that number is the user's own, as many systems make it."""
    status = os.stat(__file__)
    for uid, trusted in ((status.st_uid, True), (status.st_uid + 1, status.st_uid == 0)):
        monkeypatch.setattr(os, "getuid", lambda uid=uid: uid)
        assert compiled._trusted_owner(status) is trusted
    for mode, group, open_to in (
        (0o700, 5, False), (0o755, 5, False), (0o757, 5, True), (0o1777, 5, False), (0o775, 5, True), (0o775, 7, False),
    ):  # fmt: skip
        assert compiled._open_to_others(SimpleNamespace(st_mode=mode, st_uid=7, st_gid=group)) is open_to
    monkeypatch.delattr(os, "getuid")
    assert compiled._trusted_owner(status)


@posix
def test_folders_are_the_users_alone(fresh):
    old = os.umask(0)
    try:
        assert compiled.cache_folder() == fresh
        assert {stat.S_IMODE(path.stat().st_mode) for path in (fresh, fresh.parent)} == {0o700}
        fresh.chmod(0o775)
        fresh.parent.chmod(0o777)
        compiled.cache_folder()
        assert {stat.S_IMODE(path.stat().st_mode) for path in (fresh, fresh.parent)} == {0o700}
    finally:
        os.umask(old)


@posix
@pytest.mark.parametrize("place", ["kernels", "dit-accel", ""])
def test_what_others_could_swap_is_refused_and_not_changed(fresh, monkeypatch, tmp_path, place):
    """A link that somebody laid would have the mode of a folder of the user's own changed; or all may write to it."""
    monkeypatch.setattr(compiled, "_commands", lambda: [["c++"]])
    own, root = tmp_path / "own", fresh.parents[1]
    own.mkdir()
    own.chmod(0o775)
    root.mkdir(mode=0o700)
    link = {"kernels": fresh, "dit-accel": fresh.parent, "": root / "other"}[place]
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(own)
    if not place:
        root.chmod(0o757)
    with pytest.warns(UserWarning, match=rf"loop.*{root}.*XDG_CACHE_HOME"):
        assert again().library is None
    assert stat.S_IMODE(own.stat().st_mode) == 0o775
    assert not list(own.iterdir())


def test_without_a_place_to_write_torch_computes(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, "_commands", lambda: [["c++"]])
    for home, why in ((Path(__file__), Path(__file__).name), ("", "home directory")):  # a file, and none
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
        with pytest.warns(UserWarning, match=rf"loop.*{why}"):
            assert again().library is None
    assert attends()


@needs_compiler
def test_a_library_that_is_not_the_loop_is_refused(quick, tmp_path):
    """It lacks a function, or takes a call of other bytes."""
    size = ctypes.sizeof(compiled.LoopCall)
    for taken, keys, why in ((size, "", r"no compiled.*pack"), (size - 8, KEYS, f"{size - 8} bytes, not of {size}")):
        compiled.SOURCE.write_text(SOURCE % (tmp_path / "witness", taken, keys))
        with pytest.warns(UserWarning, match=why):
            assert again().library is None


@needs_compiler
def test_a_file_of_another_machine_is_left_alone(quick):
    """Its digest is right, and it can't be loaded here: it stays, beside the one that is built."""
    first = name_of(compiled.compiled_loop())
    other = quick / f"fused-{first.stem.split('-')[1]}-{compiled._digest(b'other')}.so"
    other.write_bytes(b"other")
    other.chmod(0o700)
    first.unlink()
    assert compiled.whole(other)
    assert name_of(again()) == first
    assert other.exists()


@needs_compiler
def test_no_memory_is_an_error_and_not_the_end():
    loop = compiled.compiled_loop().library
    sizes = dict(columns=64, num_q=9, num_k=9, batch=1, heads=1, key_heads=1, groups=1, threads=3, end=9)
    for name, rows, dim in (("attend", 1 << 40, 64), ("pack", 64, 1 << 40)):
        call = compiled.LoopCall(rows=rows, dim=dim, value_dim=dim, **sizes)
        with pytest.raises(MemoryError, match=rf"{name}.*no memory"):
            getattr(loop, name)(ctypes.byref(call))


def test_a_processor_is_told_by_its_model_and_instructions_in_one_order(monkeypatch):
    """A set's order differs from process to process: each would build anew."""
    lines = [f"model name\t: {i}" for i in (3, 1, 2, 0, 5, 4)] + ["bogomips\t: 1", "flags\t\t: fpu", "Features\t: neon"]
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "\n".join(lines * 2))
    expected = ["Features\t: neon", "flags\t\t: fpu", *(f"model name\t: {i}" for i in range(6))]
    assert compiled.processor_text() == "\n".join(expected)


@needs_compiler
def test_it_is_built_once_whoever_asks_at_the_same_time(quick, monkeypatch):
    """Threads of one process; another processor's is another file."""
    with ThreadPoolExecutor(3) as pool:
        names = {name_of(x) for x in pool.map(lambda _: compiled.compiled_loop(), range(3))}
    assert names == set(quick.iterdir())
    assert len(names) == 1
    monkeypatch.setattr(compiled, "processor_text", lambda: "another")
    assert name_of(again()) not in names


@pytest.mark.slow
@needs_compiler
def test_processes_find_one_whole_file(fresh):
    code = "from dit_accel_kernels.backends.torch import compiled; print(compiled.compiled_loop().library._name)"

    def ask(_: int) -> str:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()

    with ThreadPoolExecutor(2) as pool:
        names = set(pool.map(ask, range(2)))
    (path,) = fresh.iterdir()
    assert names == {str(path)}
