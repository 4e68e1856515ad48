"""Anything at all as a method config, a command line or a prompt file: it works, or one sentence says why it does not.

`DIT_ACCEL_FUZZ=10000 pytest tests/core/test_fuzz.py` tries as many cases of each.
"""

import dataclasses
import os
import re
import string

import tomli_w
from dit_accel_pipelines.generation.request import read_prompts
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from dit_accel.cli.app import app
from dit_accel.errors import DitAccelError
from dit_accel.methods.registry import methods
from dit_accel.methods.toml import from_toml, run_table, to_toml

CASES = int(os.environ.get("DIT_ACCEL_FUZZ", "40"))
many = settings(max_examples=CASES, suppress_health_check=list(HealthCheck))

OPTIONS = sorted({field.name for kind in methods().values() for field in dataclasses.fields(kind)})
NUMBERS = st.integers(-(10**6), 10**6) | st.floats(allow_nan=True, allow_infinity=True) | st.booleans()
WORDS = st.sampled_from(["auto", "skip", "pooled", "cached", "L3H1", "0-3", "all", "", "a", "none", "1e400", "-1"])
VALUES = st.recursive(NUMBERS | WORDS | st.text(max_size=6), lambda one: st.lists(one, max_size=3), max_leaves=4)
TABLES = st.dictionaries(
    st.sampled_from([*methods(), "run", "version", "tuned", "radail"]),
    st.dictionaries(st.sampled_from([*OPTIONS, "num_inference_steps", "solver", "oops"]), VALUES, max_size=4) | VALUES,
    max_size=3,
)


def one_line(error: Exception | str) -> str:
    text = str(error)
    assert text.strip()
    assert "Traceback" not in text
    assert not re.search(r"<[\w.]+ object at 0x", text)
    return text


def refusal(read, given):
    """What is said of something that is refused, one sentence; None: it is read."""
    try:
        read(given)
    except DitAccelError as error:
        return one_line(error)
    return None


def read_back(text):
    """Whether the configs of a text come back from what is written of them."""
    configs = from_toml(text)
    return repr(from_toml(to_toml(configs))) == repr(configs)


@many
@given(TABLES.map(tomli_w.dumps) | st.text(max_size=80) | st.text(alphabet=string.printable, max_size=80))
@example("[lite]\nmust_keep = [[0.5, 1e308]]")
@example("[radial]\nblock_size = true")
@example("[radial")
@example("radial = 3")
@example("\ufeff[radial]\nrest='pooled'")
def test_tables_of_methods_and_any_text_as_one(text):
    assert refusal(run_table, text) or refusal(from_toml, text) or read_back(text)


@many
@given(st.binary(max_size=60))
@example(b"\xff\xfe")
@example(b"\n \n")
@example(b"\xef\xbb\xbfa red circle\r\n\x0c\n")
def test_any_bytes_as_a_prompt_file(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("prompts") / "p.txt"
    path.write_bytes(content)
    if not refusal(read_prompts, path):
        prompts = read_prompts(path)
        assert prompts
        assert all(prompt == prompt.strip() != "" for prompt in prompts)


SIZES = st.sampled_from(["--height", "--width", "--num-frames", "--num-inference-steps", "--seed", "--dtype"])
PIECES = (
    st.sampled_from([f"--{name}" for name in methods()]).map(lambda word: [word])
    | st.tuples(SIZES, st.sampled_from(["16", "32", "0", "-1", "17", "x", "1e3", "nan", ""])).map(list)
    | st.tuples(st.sampled_from([*methods(), "oops"]), st.sampled_from([*OPTIONS, "oops"]), WORDS | st.text(max_size=5))
    .map(lambda one: ["--set", f"{one[0]}.{one[1]}={one[2]}"])
    | st.tuples(st.just("--preset"), st.sampled_from(["fast", "careful", "none", "fats"])).map(list)
    | st.sampled_from(["--json", "--oops", "-x", "stray", "--", "--config", "--set"]).map(lambda word: [word])
)  # fmt: skip


@many
@given(st.sampled_from(["plan", "recommend", "methods", "models", "pln"]), st.lists(PIECES, max_size=4))
@example("plan", [["--set", "radial.order"]])
@example("plan", [["--lite"], ["--set", "lite.must_keep=1"]])
def test_any_command_line(command, pieces):
    words = [word for piece in pieces for word in piece]
    model = ["--family", "wan-plain"] if command in ("plan", "recommend") else []
    ran = CliRunner().invoke(app, [command, *model, *words])
    assert ran.exit_code in (0, 2), (words, ran.output, ran.exception)
    assert "Traceback" not in ran.output
    if ran.exit_code == 2:
        one_line(ran.stderr)
