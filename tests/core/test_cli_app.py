"""The application: method options, lists, errors, exit codes and a quick start."""

import dataclasses
import json
import os
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
from dit_accel.cli.console import print_json
from dit_accel.cli.method_options import first_line, select_methods, with_method_options
from dit_accel.errors import LONG_LIST, ConfigError, did_you_mean
from dit_accel.methods import registry as method_registry
from dit_accel.methods.config import MethodConfig
from dit_accel.methods.toml import to_toml
from dit_accel.methods.verdicts import refused_by, spell_refusal


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from dit_accel.cli import main; sys.argv[0] = 'dit-accel'; main()"
    environment = {**os.environ, "COLUMNS": "80"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_later_settings_win(tmp_path: Path):
    path = tmp_path / "methods.toml"
    path.write_text(to_toml([RadialAttention(decay_factor=0.3, near="full")]))
    settings = ["radial.decay_factor=0.5", "radial.decay_factor=0.7", "radial.sink=true"]
    (radial,) = select_methods(["radial"], path, settings)
    assert radial == RadialAttention(decay_factor=0.7, near="full", sink=True)


def test_a_setting_switches_its_method_on():
    assert select_methods([], None, ["radial.rest=pooled"]) == [RadialAttention(rest="pooled")]
    assert select_methods(["radial"], None, []) == [RadialAttention()]
    assert select_methods([], None, []) == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("radial", "--set 'radial' is not METHOD.OPTION=VALUE; write, say, --set radial.decay_factor=0.5"),
        ("radial=1", "is not METHOD.OPTION=VALUE"),
        (".x=1", "is not METHOD.OPTION=VALUE"),
        ("radail.near=full", "--set 'radail.near=full' names no method; did you mean 'radial'"),
        ("radial.decayfactor=1", "radial has no option 'decayfactor'; did you mean 'decay_factor'"),
        (
            "radial.decay_factor=1\nradial.near=2",
            "--set 'radial.decay_factor=1\\nradial.near=2' has more than one line; give one --set for each option",
        ),
        ("radial.sink=yes", "radial.sink must be true or false or unset, got 'yes'"),
    ],
)
def test_bad_settings(setting, message):
    with pytest.raises(ConfigError) as caught:
        select_methods([], None, [setting])
    assert message in str(caught.value)
    result = run("plan", "--family", "wan-plain", "--set", setting)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_bad_config_files(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"--config .*none\.toml.*\(No such file"):
        select_methods([], tmp_path / "none.toml", [])
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"binary\.toml.*'utf-8' codec"):
        select_methods([], tmp_path / "binary.toml", [])
    (tmp_path / "typo.toml").write_text("[radail]\nnear = 'full'\n")
    with pytest.raises(ConfigError, match=r"--config.*typo\.toml.*'radail'.*'radial'"):
        select_methods([], tmp_path / "typo.toml", [])
    (tmp_path / "broken.toml").write_text("[radial\n")
    with pytest.raises(ConfigError, match=r"--config .*broken\.toml.*TOML"):
        select_methods([], tmp_path / "broken.toml", [])


def test_a_byte_order_mark_is_no_part_of_a_config_file(tmp_path: Path):
    (tmp_path / "marked.toml").write_bytes(b"\xef\xbb\xbf[radial]\nnear = 'full'\n")
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
    assert "Does something else  " in CliRunner().invoke(single, ["--help"]).stdout  # in brief
    assert CliRunner().invoke(single, ["--something-else", "--radial", "--size", "3"]).exit_code == 0
    assert seen == [(3, [RadialAttention, Other])]


def test_a_command_without_methods_stays_as_it_is():
    def command(size: int = 1) -> None:
        """Do it."""

    assert with_method_options(command) is command


def test_methods_lists_options_and_defaults():
    (radial,) = (method for method in json.loads(run("methods", "--json").stdout) if method["name"] == "radial")
    options = {option["name"]: option for option in radial["options"]}
    assert set(options) == {field.name for field in dataclasses.fields(RadialAttention)}
    assert options["boundary"]["default"] == "any"
    assert options["near"]["type"] == "'full' or 'half'"
    assert options["decay_factor"]["default"] is None
    assert all(option["meaning"] for option in options.values())
    text = run("methods", "--options").stdout
    assert "--radial" in text
    assert "block_size" in text
    for arguments in (("--options", "radial"), ("radial",)):
        one = run("methods", *arguments).stdout
        assert "decay_factor" in one
        assert "--sol" not in one
    assert [method["name"] for method in json.loads(run("methods", "sol", "radial", "--json").stdout)] == [
        "sol",
        "radial",
    ]
    assert run("methods", "radail").stderr.startswith("error: there is no method 'radail'; did you mean 'radial'?")
    short = run("methods").stdout
    assert "--radial" in short
    assert "block_size" not in short
    assert "dit-accel recommend" in short


def test_models_lists_families():
    rows = {row["name"]: row for row in json.loads(run("models", "--json").stdout)}
    assert {"radial", "sol"} <= set(rows["wan2.1-14b"]["methods"])
    assert rows["wan2.1-14b"]["tokens"] == 75_600
    assert rows["hunyuan-video"]["attachable"]
    assert rows["flux.1-dev"]["refused"] == {
        "radial": "an image is one frame, of which the mask keeps everything",
        "dfa": "an image does not move, which is how the foreground is recognised",
        "lvsa": "an image has no frames of which there could be more than the model was trained on",
        "ultravico": "an image has no frames of which there could be more than the model was trained on",
    }
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
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(command in result.stdout for command in ("generate", "describe", "plan", "methods", "models"))
    loaded = set(result.stdout.splitlines()[-1].split())
    assert not {"torch", "diffusers", "transformers", "numpy", "dit_accel_pipelines.families.all_families"} & loaded

    typer_alone = "import typer; app = typer.Typer(); app.command('a')(print); app.command('b')(print); app()"
    least = calls_of(typer_alone)
    ours = calls_of("from dit_accel.cli.app import app; app()")  # counted, as times are noisy
    assert ours < 1.6 * least  # 1.34 measured


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
    command = [sys.executable, "-c", counting, code, "--help"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()[-1])


def test_the_list_of_commands_says_what_the_commands_say():
    for name, (module, summary) in BUILT_IN.items():
        assert summary == first_line(getattr(import_module(module, "dit_accel.cli"), name))
        assert summary in " ".join(run(name, "--help").stdout.split())
        assert summary[:30] in run("--help").stdout


def test_help_is_in_the_order_of_use_and_flags_take_no_value():
    listed = re.findall(r"^│ ([a-z]+) ", script("--help").stdout, re.MULTILINE)
    assert listed == [*BY_USE]
    told = script("generate", "--help").stdout
    assert re.findall(r"^╭─ (\w+)", told, re.MULTILINE) == [
        "Arguments", "Options", "Prompts", "Running", "Which", "Methods",
    ]  # fmt: skip
    assert told.index("--preset") < told.index("--prompt-file") < told.index("--device") < told.rindex("--radial ")
    assert len(told.splitlines()) < 150  # of 80 columns
    for command in ((), ("generate",), ("eval", "compare"), ("eval",), ("bench",)):
        assert "<bool>" not in script(*command, "--help").stdout


def test_the_version():
    assert run("--version").stdout.startswith("dit-accel 0.")


def test_no_command_shows_the_help():
    result = run()
    assert result.exit_code == 2
    codes = "Exit codes: 0 done, 1 failed while running, 2 bad input or a full disk, 130 stopped by Ctrl-C, 143 stopped"
    assert f"{codes} by SIGTERM." in " ".join(result.stdout.split())


def test_a_mistyped_command():
    result = run("pln")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: there is no command 'pln'; did you mean 'plan'? known: ")
    assert result.stderr.count("\n") == 1
    assert "plan" in run("--help").stdout


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


def test_an_interrupt_is_exit_code_130(monkeypatch):
    monkeypatch.setattr(installed, "family", raising(KeyboardInterrupt()))
    result = run("plan", "--family", "wan-plain")
    assert result.exit_code == 130
    assert result.stderr == "error: stopped by Ctrl-C; nothing half-written is left\n"


def test_a_sigterm_is_exit_code_143_and_cleans_up(monkeypatch):
    cleaned = []

    def stopped(name: str) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            cleaned.append(name)

    monkeypatch.setattr(installed, "family", stopped)
    before = signal.getsignal(signal.SIGTERM)
    result = run("plan", "--family", "wan-plain")
    assert result.exit_code == 143
    assert result.stderr == "error: stopped by SIGTERM; nothing half-written is left\n"
    assert cleaned == ["wan-plain"]
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.undo()
    assert run("plan", "--family", "wan-plain").exit_code == 0
    assert signal.getsignal(signal.SIGTERM) == before


def test_commands_run_outside_the_main_thread():
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(run, "plan", "--family", "wan-plain").result()
    assert result.exit_code == 0, result.stderr


def test_json_on_stdout_is_valid(capsys):
    print_json({"speedup": float("inf")})
    assert capsys.readouterr().out == '{\n  "speedup": null\n}\n'


def test_exit_codes_of_the_process():
    assert script("--version").returncode == 0
    bad = script("plan", "--family", "nothing")
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


def test_the_command_line_is_a_module():
    command = [sys.executable, "-m", "dit_accel", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == script("--version").stdout
