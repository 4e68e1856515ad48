"""The application: method options, lists, errors, exit codes and a quick start."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from dit_accel_assets import model_names
from typer.testing import CliRunner

from dit_accel import RadialAttention
from dit_accel.adapters import installed
from dit_accel.adapters.adapter import ONE_FRAME, Adapter
from dit_accel.cli import MethodList
from dit_accel.cli.app import BUILT_IN, BY_USE, app
from dit_accel.cli.method_options import first_line, select_methods, with_method_options
from dit_accel.errors import LONG_LIST, ConfigError, did_you_mean
from dit_accel.methods import registry as method_registry
from dit_accel.methods.config import MethodConfig
from dit_accel.methods.toml import to_toml
from dit_accel.methods.verdicts import refused_by, spell_refusal


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80"})


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def test_a_setting_switches_its_method_on_and_later_ones_win(tmp_path: Path):
    assert select_methods([], None, ["radial.rest=pooled"]) == [RadialAttention(rest="pooled")]
    assert select_methods([], None, []) == []
    path = tmp_path / "methods.toml"
    path.write_text(to_toml([RadialAttention(decay_factor=0.3, near="full")]))
    settings = ["radial.decay_factor=0.5", "radial.decay_factor=0.7", "radial.sink=true"]
    (radial,) = select_methods(["radial"], path, settings)
    assert radial == RadialAttention(decay_factor=0.7, near="full", sink=True)


def test_bad_settings():
    for setting, message in (
        ("radial", "--set 'radial' is not METHOD.OPTION=VALUE; write, say, --set radial.decay_factor=0.5"),
        ("radail.near=full", "--set 'radail.near=full' names no method; did you mean 'radial'"),
        ("radial.decayfactor=1", "radial has no option 'decayfactor'; did you mean 'decay_factor'"),
        ("radial.decay_factor=1\nradial.near=2", "--set 'radial.decay_factor=1\\nradial.near=2' has more than one"),
        ("radial.sink=yes", "radial.sink must be true or false or unset, got 'yes'"),
    ):
        result = run("plan", "--family", "wan-plain", "--set", setting)
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in result.stderr


def test_config_files(tmp_path: Path):
    bad = {
        "binary": (b"\xff\xfe", "'utf-8' codec"),
        "typo": (b"[radail]", "'radail'.*'radial'"),
        "broken": (b"[a", "TOML"),
    }
    for name, (content, message) in bad.items():
        (tmp_path / f"{name}.toml").write_bytes(content)
        with pytest.raises(ConfigError, match=rf"--config .*{name}\.toml.*{message}"):
            select_methods([], tmp_path / f"{name}.toml", [])
    with pytest.raises(ConfigError, match=r"--config .*none\.toml.*\(No such file"):
        select_methods([], tmp_path / "none.toml", [])
    (tmp_path / "marked.toml").write_bytes(b"\xef\xbb\xbf[radial]\nnear = 'full'\n")  # a byte-order mark
    assert select_methods([], tmp_path / "marked.toml", []) == [RadialAttention(near="full")]


def test_a_new_method_needs_no_edit_here(monkeypatch):
    class Other(MethodConfig):
        """Does something else (source); and more."""

        name = "something_else"

    both: dict[str, Any] = {"radial": RadialAttention, "something_else": Other}
    monkeypatch.setattr(method_registry, "methods", lambda: both)
    monkeypatch.setattr(method_registry, "method", both.__getitem__)
    seen = []

    def command(size: Annotated[int, typer.Option()] = 1, *, methods: MethodList) -> None:
        """Do it."""
        seen.append((size, [type(method) for method in methods]))

    single = typer.Typer()
    single.command()(with_method_options(command))
    assert with_method_options(test_a_new_method_needs_no_edit_here) is test_a_new_method_needs_no_edit_here
    assert "Does something else  " in CliRunner().invoke(single, ["--help"]).stdout  # in brief
    assert CliRunner().invoke(single, ["--something-else", "--radial", "--size", "3"]).exit_code == 0
    assert seen == [(3, [RadialAttention, Other])]


def test_methods_lists_options_and_defaults():
    (radial,) = (method for method in json.loads(run("methods", "--json").stdout) if method["name"] == "radial")
    options = {option["name"]: option for option in radial["options"]}
    assert set(options) == {field.name for field in dataclasses.fields(RadialAttention)}
    assert (options["boundary"]["default"], options["decay_factor"]["default"]) == ("any", None)
    assert options["near"]["type"] == "'full' or 'half'"
    assert all(option["meaning"] for option in options.values())
    for arguments, there, away in (
        (["--options"], ["--radial", "block_size", "--sol"], []),
        (["--options", "radial"], ["decay_factor"], ["--sol"]),
        (["radial"], ["decay_factor"], ["--sol"]),
        ([], ["--radial", "dit-accel recommend"], ["block_size"]),
    ):
        text = run("methods", *arguments).stdout
        assert all(word in text for word in there)
        assert not any(word in text for word in away)
    listed = json.loads(run("methods", "sol", "radial", "--json").stdout)
    assert [method["name"] for method in listed] == ["sol", "radial"]
    assert run("methods", "radail").stderr.startswith("error: there is no method 'radail'; did you mean 'radial'?")


def test_models_lists_families():
    rows = {row["name"]: row for row in json.loads(run("models", "--json").stdout)}
    assert {"radial", "sol"} <= set(rows["wan2.1-14b"]["methods"])
    assert rows["wan2.1-14b"]["tokens"] == 75_600
    assert rows["hunyuan-video"]["attachable"]
    assert rows["flux.1-dev"]["refused"]["radial"] == "an image is one frame, of which the mask keeps everything"
    assert set(rows) == set(installed.families())
    assert [name for name, row in rows.items() if row["embedded"]] == list(model_names())
    text = run("models").stdout
    assert all(f"embedded: --model {name}  (height " in text for name in model_names())
    verdicts = " ".join(text[text.rindex("embedded: ") :].split())
    for adapter in installed.adapters().values():
        refused = refused_by(adapter) if adapter.transformers else {}
        listed = (", ".join(refused) or "-") if adapter.transformers else "all: it is planned alone"
        assert f" {adapter.name} {listed}" in verdicts
        assert all(verdicts.count(f"{name} is {spell_refusal(why, adapter)} (") == 1 for name, why in refused.items())


def test_verdicts_tell_degenerate_from_refused():
    adapter = Adapter(
        name="any", transformers=(), self_attention=(), refused={"radial": ONE_FRAME, "lite": "no reason"}
    )
    refused = refused_by(adapter)
    assert spell_refusal(refused["radial"], adapter) == f"degenerate: {ONE_FRAME}"
    assert spell_refusal(refused["lite"], adapter) == "refused: no reason"
    assert spell_refusal("nag can't on any: any-thing", adapter) == "refused: nag can't on the model: any-thing"
    assert "easycache" not in refused


def test_help_is_quick_and_loads_no_torch():
    code = "import sys; from dit_accel.cli.app import app; app(['--help'], standalone_mode=False); print(*sys.modules)"
    result = script("-c", code)
    assert all(command in result.stdout for command in ("generate", "describe", "plan", "methods", "models"))
    loaded = set(result.stdout.splitlines()[-1].split())
    assert not {"torch", "diffusers", "transformers", "numpy", "dit_accel_pipelines.families.all_families"} & loaded
    typer_alone = "import typer; app = typer.Typer(); app.command('a')(print); app.command('b')(print); app()"
    ours = calls_of("from dit_accel.cli.app import app; app()")  # counted, as times are noisy
    assert ours < 1.6 * calls_of(typer_alone)  # 1.34 measured


def calls_of(code: str) -> int:
    """Return how many Python functions a process calls that runs ``code`` with --help: its time, without the noise."""
    counting = """
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
print(calls, file=sys.stderr)
"""
    return int(script("-c", counting, code, "--help").stderr.splitlines()[-1])


def test_the_list_of_commands_says_what_the_commands_say():
    for name, (module, summary) in BUILT_IN.items():
        assert summary == first_line(getattr(import_module(module, "dit_accel.cli"), name))
        assert summary in " ".join(run(name, "--help").stdout.split())
        assert summary[:30] in run("--help").stdout


def test_help_is_in_the_order_of_use_and_flags_take_no_value():
    listed = re.findall(r"^│ ([a-z]+) ", run("--help").stdout, re.MULTILINE)
    assert listed == [*BY_USE]
    text = run("generate", "--help").stdout
    assert re.findall(r"^╭─ (\w+)", text, re.MULTILINE) == [
        "Arguments", "Options", "Prompts", "Running", "Which", "Methods",
    ]  # fmt: skip
    assert text.index("--preset") < text.index("--prompt-file") < text.index("--device") < text.rindex("--radial ")
    assert len(text.splitlines()) < 150  # of 80 columns
    for command in ((), ("generate",), ("eval", "compare"), ("eval",), ("bench",)):
        assert "<bool>" not in run(*command, "--help").stdout


def test_without_a_known_command_there_is_help():
    result = run()
    assert result.exit_code == 2
    codes = "Exit codes: 0 done, 1 failed while running, 2 bad input or a full disk, 130 stopped by Ctrl-C, 143 stopped"
    assert f"{codes} by SIGTERM." in " ".join(result.stdout.split())
    result = run("pln")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: there is no command 'pln'; did you mean 'plan'? known: ")
    assert result.stderr.count("\n") == 1


def test_long_lists_give_near_names_only():
    few = [f"name-{n}" for n in range(LONG_LIST)]
    assert did_you_mean("name-1x", few) == f"did you mean 'name-1'? known: {', '.join(sorted(few))}"
    told = did_you_mean("name-1x", [*few, "other"])
    assert told.startswith("did you mean 'name-1' or ")
    assert told.endswith(f"? {LONG_LIST + 1} are known, `dit-accel models` lists them all")
    assert len(told) < 120
    assert did_you_mean("?", [*few, "other"]) == f"{LONG_LIST + 1} are known, `dit-accel models` lists them all"


def raising(error: BaseException):
    def fail(name: str) -> None:
        raise error

    return fail


def test_a_failure_is_one_line_and_exit_code_1(monkeypatch):
    monkeypatch.setattr(installed, "family", raising(RuntimeError("out of\nmemory")))
    result = run("plan", "--family", "wan-plain")
    assert (result.exit_code, result.stdout) == (1, "")
    expected = "error: RuntimeError: out of memory (--traceback shows where)\n"
    assert result.stderr == expected
    for arguments in (("--traceback", "plan"), ("plan", "--traceback")):
        traced = run(*arguments, "--family", "wan-plain")
        assert traced.exit_code == 1
        assert "Traceback" in traced.stderr
        assert traced.stderr.endswith(expected)
    assert "Traceback" not in run("plan", "--family", "wan-plain").stderr


def test_a_warning_is_one_line(monkeypatch):
    def warning(name: str) -> None:
        warnings.warn("nothing was\n  planned", stacklevel=1)
        raise ConfigError("so")

    monkeypatch.setattr(installed, "family", warning)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        before = warnings.showwarning
        assert run("plan", "--family", "wan-plain").stderr == "warning: nothing was planned\nerror: so\n"
        assert warnings.showwarning is before


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_cleans_up_and_has_an_exit_code(monkeypatch, number: signal.Signals, name: str):
    cleaned = []

    def stopped(family: str) -> None:
        try:
            signal.raise_signal(number)
        finally:
            cleaned.append(family)

    monkeypatch.setattr(installed, "family", stopped)
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)
    result = run("plan", "--family", "wan-plain")
    assert (result.exit_code, cleaned) == (128 + number, ["wan-plain"])
    assert result.stderr == f"error: stopped by {name}; nothing half-written is left\n"
    assert (signal.signal(signal.SIGINT, before[0]), signal.getsignal(signal.SIGTERM)) == (
        signal.default_int_handler, before[1],
    )  # fmt: skip


def test_commands_run_outside_the_main_thread():
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(run, "plan", "--family", "wan-plain").result()
    assert result.exit_code == 0, result.stderr


def test_the_process_of_the_command_line():
    version = script("-m", "dit_accel", "--version")
    assert (version.returncode, version.stdout[:12]) == (0, "dit-accel 0.")
    bad = script("-m", "dit_accel", "plan", "--family", "nothing")
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1)
    assert "Traceback" not in bad.stderr


def grouped(monkeypatch) -> list[Any]:
    """Register a stranger's group with a group inside; returns what its commands were given."""
    seen: list[Any] = []
    group, inner = typer.Typer(help="Take care of cats."), typer.Typer(name="toys", help="And of toys.")

    @group.command("feed")
    def feed(times: int = 1, *, methods: MethodList) -> None:
        """Feed them."""
        seen.append((times, [type(method) for method in methods]))

    @inner.command("lose")
    def lose() -> None:
        """Lose one."""
        raise ConfigError("it is lost; look below the sofa")

    group.add_typer(inner)
    monkeypatch.setattr("dit_accel.cli.installed_commands.commands", lambda: {"cats": group})
    return seen


def test_an_entry_may_be_a_group_of_commands(monkeypatch):
    seen = grouped(monkeypatch)
    assert "Take care of cats." in run("--help").stdout
    told = run("cats", "--help").stdout
    assert "Feed them." in told
    assert "And of toys." in told
    assert run("cats", "feed", "--times", "3", "--radial").exit_code == 0
    assert seen == [(3, [RadialAttention])]
    lost = run("cats", "toys", "lose")
    assert (lost.exit_code, lost.stderr) == (2, "error: it is lost; look below the sofa\n")
    assert "Traceback" in run("cats", "toys", "lose", "--traceback").stderr
    bad = run("cats", "fed")
    assert (bad.exit_code, bad.stderr) == (
        2,
        "error: cats has no command 'fed'; did you mean 'feed'? known: feed, toys\n",
    )
    assert "Feed them." in run("cats").stdout
