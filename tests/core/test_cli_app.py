"""The application: method options, lists, errors, exit codes, a quick start, and signals that end it soon."""

import dataclasses
import json
import logging
import os
import re
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer
from dit_accel_assets import model_names
from typer.testing import CliRunner

from dit_accel import RadialAttention
from dit_accel.adapters import installed
from dit_accel.cli import MethodList
from dit_accel.cli.app import BUILT_IN, BY_USE, app
from dit_accel.cli.method_options import first_line, select_methods
from dit_accel.cli.stopping import watch
from dit_accel.errors import ConfigError
from dit_accel.methods.toml import to_toml
from dit_accel.methods.verdicts import refused_by, spell_refusal


def run(*words: str):
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "80"})


PLAN = ("plan", "--family", "wan-plain")


def test_a_setting_switches_its_method_on_and_later_ones_win(tmp_path):
    assert select_methods([], None, ["radial.rest=pooled"]) == [RadialAttention(rest="pooled")]
    assert select_methods([], None, []) == []
    path = tmp_path / "methods.toml"
    path.write_text(to_toml([RadialAttention(decay_factor=0.3, near="full")]))
    settings = ["radial.decay_factor=0.5", "radial.decay_factor=0.7", "radial.sink=true"]
    (radial,) = select_methods(["radial"], path, settings)
    assert radial == RadialAttention(decay_factor=0.7, near="full", sink=True)
    for setting, message in (
        ("radial", "--set 'radial' is not METHOD.OPTION=VALUE; write, say, --set radial.decay_factor=0.5"),
        ("radail.near=full", "--set 'radail.near=full' names no method; did you mean 'radial'"),
        ("radial.decay_factor=1\nradial.near=2", "--set 'radial.decay_factor=1\\nradial.near=2' has more than one"),
        ("radial.sink=yes", "radial.sink must be true or false or unset, got 'yes'"),
    ):
        result = run(*PLAN, "--set", setting)
        assert (result.exit_code, result.stdout, message in result.stderr) == (2, "", True)


def test_config_files(tmp_path):
    for name, content, message in (
        ("binary", b"\xff\xfe", "'utf-8' codec"),
        ("typo", b"[radail]", "'radail'.*'radial'"),
        ("broken", b"[a", "TOML"),
        ("none", None, r"\(No such file"),
    ):
        path = tmp_path / f"{name}.toml"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"--config .*{name}\.toml.*{message}"):
            select_methods([], path, [])
    (tmp_path / "marked.toml").write_bytes(b"\xef\xbb\xbf[radial]\nnear = 'full'\n")  # a byte-order mark
    assert select_methods([], tmp_path / "marked.toml", []) == [RadialAttention(near="full")]


def test_methods_lists_options_and_defaults():
    sol, radial = json.loads(run("methods", "sol", "radial", "--json").stdout)
    options = {option["name"]: option for option in radial["options"]}
    assert (sol["name"], set(options)) == ("sol", {field.name for field in dataclasses.fields(RadialAttention)})
    assert (options["boundary"]["default"], options["decay_factor"]["default"]) == ("any", None)
    assert options["near"]["type"] == "'full' or 'half'"
    assert all(option["meaning"] for option in options.values())
    for words, there, away in (
        (["--options"], ["--radial", "block_size", "--sol"], "no such thing"),
        (["--options", "radial"], ["decay_factor"], "--sol"),
        (["radial"], ["decay_factor"], "--sol"),
        ([], ["--radial", "dit-accel recommend"], "block_size"),
    ):
        text = run("methods", *words).stdout
        assert all(word in text for word in there)
        assert away not in text
    assert run("methods", "radail").stderr.startswith("error: there is no method 'radail'; did you mean 'radial'?")


def test_models_lists_families():
    rows = {row["name"]: row for row in json.loads(run("models", "--json").stdout)}
    wan = rows["wan2.1-14b"]
    assert ({"radial", "sol"} <= set(wan["methods"]), wan["tokens"], wan["attachable"]) == (True, 75_600, True)
    assert rows["flux.1-dev"]["refused"]["radial"] == "an image is one frame, of which the mask keeps everything"
    assert set(rows) == set(installed.families())
    assert sorted(name for name, row in rows.items() if row["embedded"]) == sorted(model_names())
    text = run("models").stdout
    assert max(map(len, text.splitlines())) <= 80
    assert all(f"embedded: --model {name}  (height " in text for name in model_names())
    verdicts = " ".join(text[text.rindex("embedded: ") :].split())
    for adapter in installed.adapters().values():
        refused = {row["adapter"]: row["refused"] for row in rows.values()}.get(adapter.name)
        refused = refused_by(adapter) if refused is None else refused
        if not adapter.transformers:
            assert f" {adapter.name} all: it is planned alone" in verdicts
            continue
        assert f" {adapter.name} {', '.join(refused) or '-'}" in verdicts
        assert all(verdicts.count(f"{name} is {spell_refusal(why, adapter)} (") == 1 for name, why in refused.items())


COUNTING = """
import sys
calls = 0
def count(frame, event, arg):
    global calls
    calls += event == "call"
sys.setprofile(count)
try:
    exec(sys.argv.pop(1))
except SystemExit:
    sys.setprofile(None)
print(calls, *sys.modules)
"""


def help_of(code: str) -> tuple[str, int, set[str]]:
    """Return what a process prints that runs ``code`` with --help, the functions that it calls, and its modules."""
    done = subprocess.run([sys.executable, "-c", COUNTING, code, "--help"], capture_output=True, text=True)
    text, _, last = done.stdout.rstrip().rpartition("\n")
    calls, *modules = last.split()
    return text, int(calls), set(modules)


def test_help_is_quick_and_loads_no_torch():
    text, calls, modules = help_of("from dit_accel.cli.app import app; app()")
    assert all(command in text for command in ("generate", "describe", "plan", "methods", "models"))
    assert not {"torch", "diffusers", "transformers", "numpy", "dit_accel_pipelines.families.all_families"} & modules
    typer_alone = "import typer; app = typer.Typer(); app.command('a')(print); app.command('b')(print); app()"
    assert calls < 1.6 * help_of(typer_alone)[1]  # 1.34 measured; counted, as times are noisy


def test_the_help_says_what_the_commands_say_in_the_order_of_use():
    text = run("--help").stdout
    assert re.findall(r"^│ ([a-z]+) ", text, re.MULTILINE) == [*BY_USE]
    for name, (module, summary) in BUILT_IN.items():
        assert summary == first_line(getattr(import_module(module, "dit_accel.cli"), name))
        assert summary in " ".join(run(name, "--help").stdout.split())
        assert summary[:30] in text
    text = run("generate", "--help").stdout
    panels = ["Options", "Weights", "Running", "Methods"]
    assert re.findall(r"^╭─ (\w+)", text, re.MULTILINE) == panels
    assert text.index("--prompt-file") < text.index("--lora") < text.index("--device") < text.rindex("--radial ")
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) < 240
    for command in ((), ("generate",), ("eval", "compare"), ("eval",), ("bench",)):
        assert "<bool>" not in run(*command, "--help").stdout


def test_without_a_known_command_there_is_help():
    result = run()
    assert result.exit_code == 2
    codes = "Exit codes: 0 done, 1 failed while running, 2 bad input or a full disk, 130 stopped by Ctrl-C, 143 stopped"
    assert f"{codes} by SIGTERM." in " ".join(result.stdout.split())
    result = run("pln")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith("error: there is no command 'pln'; did you mean 'plan'? known: ")


def test_a_failure_is_one_line_and_exit_code_1_and_a_warning_is_one_line(monkeypatch):
    def fail(name: str) -> None:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(installed, "family", fail)
    expected = "error: RuntimeError: out of memory (--traceback shows where)\n"
    for words, traced in ((PLAN, False), (("--traceback", *PLAN), True), ((*PLAN, "--traceback"), True), (PLAN, False)):
        result = run(*words)
        assert (result.exit_code, result.stdout) == (1, "")
        assert ("Traceback" in result.stderr) == traced
        assert result.stderr.endswith(expected)
        assert (result.stderr == expected) != traced

    def warning(name: str) -> None:
        warnings.warn("nothing was\n  planned", stacklevel=1)
        logging.getLogger("torchao").warning("of another library")
        raise ConfigError("so")

    monkeypatch.setattr(installed, "family", warning)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        before = warnings.showwarning
        assert run(*PLAN).stderr == "warning: nothing was planned\nerror: so\n"
        assert warnings.showwarning is before


def test_a_process_and_a_thread_run_commands():
    bad = subprocess.run([sys.executable, "-m", "dit_accel", *PLAN[:2], "nothing"], capture_output=True, text=True)
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n"), "Traceback" in bad.stderr) == (2, "", 1, False)
    with ThreadPoolExecutor(1) as pool:
        version, plan = pool.submit(run, "--version").result(), pool.submit(run, *PLAN).result()
    assert (version.exit_code, version.stdout[:12], plan.exit_code) == (0, "dit-accel 0.", 0)


def test_an_entry_may_be_a_group_of_commands(monkeypatch):
    """A stranger's group with a group inside."""
    seen: list[Any] = []
    group, inner = typer.Typer(help="Take care of cats."), typer.Typer(name="toys", help="And of toys.")

    @group.command("feed")
    def feed(times: int = 1, *, methods: MethodList) -> None:
        """Feed them."""
        seen.append((times, [type(method) for method in methods]))

    @inner.command("lose")
    def lose() -> None:
        raise ConfigError("it is lost; look below the sofa")

    group.add_typer(inner)
    monkeypatch.setattr("dit_accel.cli.installed_commands.commands", lambda: {"cats": group})
    for words, text in ((["--help"], "care of cats."), (["cats"], "Feed them."), (["cats", "--help"], "And of toys.")):
        assert text in run(*words).stdout
    assert run("cats", "feed", "--times", "3", "--radial").exit_code == 0
    assert seen == [(3, [RadialAttention])]
    assert run("cats", "toys", "lose").stderr == "error: it is lost; look below the sofa\n"
    assert run("cats", "fed").stderr.startswith("error: cats has no command 'fed'; did you mean 'feed'? known: feed, t")
    assert "Traceback" in run("cats", "toys", "lose", "--traceback").stderr


HEAD = """
import atexit, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore Ctrl-C
from dit_accel.cli import installed_commands, main, stopping
stopping.STOP.patience = 0.5

def now():
    print("now", file=sys.stderr, flush=True)
"""
TAIL = """
installed_commands.commands = lambda: {"work": work}
main()
"""

SWALLOWED = """
def work():
    now()
    try:
        time.sleep(60)
    except BaseException:
        time.sleep(60)
"""

WHILE_LOADING = """
import tempfile
folder = tempfile.mkdtemp()
open(folder + "/slow.py", "w").write("import __main__, time; __main__.now(); time.sleep(60)")
sys.path.insert(0, folder)

def work():
    from dit_accel.files import written_whole
    with written_whole("half.txt") as path:
        path.write_text("half")
        import slow
"""

SLOW_END = """
def work():
    atexit.register(lambda: (now(), time.sleep(60)))
"""

AFTER_THE_END = """
def work():
    atexit.register(signal.raise_signal, signal.SIGINT)
"""

CLEANS_UP = """
def work():
    stopping.STOP.files = "all stands"
    try:
        now()
        time.sleep(60)
    finally:
        now()
"""


@pytest.mark.parametrize(
    ("body", "number", "last"),
    [
        (SWALLOWED, signal.SIGTERM, "now\nerror: stopped by SIGTERM; nothing half-written is left\n"),
        (WHILE_LOADING, signal.SIGINT, "now\nerror: stopped by Ctrl-C; nothing half-written is left\n"),
        (SLOW_END, signal.SIGTERM, "now\nerror: stopped by SIGTERM; nothing half-written is left\n"),
        (AFTER_THE_END, None, ""),
        (CLEANS_UP, signal.SIGTERM, "now\nnow\nerror: stopped by SIGTERM; all stands\n"),
    ],
    ids=["swallowed", "loading", "slow end", "after the last line", "in a block that cleans up"],
)
def test_a_signal_ends_a_command_wherever_it_is(tmp_path: Path, body: str, number: signal.Signals | None, last: str):
    command = [sys.executable, "-c", HEAD + body + TAIL, "work"]
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment, text = {**os.environ, "PYTHONPATH": path}, ""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment) as process:
        try:
            if number:
                text = process.stderr.readline()
                process.send_signal(number)
            text += process.communicate(timeout=20)[1]
        finally:
            process.kill()
    assert (process.returncode, text) == (128 + number if number else 0, last)
    assert [*tmp_path.iterdir()] == []


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch):
    handlers = {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_DFL}
    monkeypatch.setattr(signal, "getsignal", handlers.get)
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    watch()
    assert handlers[signal.SIGINT] == signal.SIG_IGN
    assert handlers[signal.SIGTERM] not in (signal.SIG_IGN, signal.SIG_DFL)
