"""What a server's setting may be, and requests through the servers' backends and modular pipelines with our plugins."""

import ast
import gc
import logging
import pkgutil
import random
import resource
import subprocess
import sys
import threading
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers.modular_pipelines import SequentialPipelineBlocks
from dit_accel_kernels import api
from matrix_runs import twin
from servers import SERVERS, STAND_INS, importable, prompted_wan, their_files
from tiny_stock import stock_pipeline

import dit_accel
from dit_accel import AttachError, ConfigError, EasyCache
from dit_accel.serving import vllm_omni
from dit_accel.serving.modular import AttachMethods
from dit_accel.serving.requests import answer, attach_requested
from dit_accel.serving.settings import VARIABLE, ServerSetting, read_setting, requested


def test_a_word_is_a_preset_and_a_file_gives_methods_and_what_it_says_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.toml").write_text(
        "[easycache]\nthreshold = 0.1\n\n[run]\nnum_inference_steps = 8\nsolver = 'euler'\n"
    )
    setting = ServerSetting((EasyCache(threshold=0.1),), run=("num_inference_steps", "solver"))
    assert read_setting(str(tmp_path / "own.toml")) == read_setting("~/own.toml") == setting
    for level in ("careful", "balanced", "fast"):
        assert read_setting(level) == ServerSetting(preset=level)
        assert not read_setting(level).empty
    assert read_setting("none").empty
    assert requested({}) == requested({"DIT_ACCEL": "  "}) == ""
    assert requested({"DIT_ACCEL": " fast\n"}) == "fast"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"\xff\xfe[", r"own\.toml"),
        (b"[easycache", r"own\.toml"),
        (b"", r"own\.toml.*'none'"),
        (b"[easycach]", "easycache"),
        (None, r"own\.toml"),
    ],
)
def test_a_bad_file_is_told_by_its_path(content, named, tmp_path):
    path = tmp_path / "own.toml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError, match=named):
        read_setting(str(path))
    with pytest.raises(ConfigError, match=r"'own\.yaml'.*careful, .*few-steps, none"):
        read_setting("own.yaml")


def test_plugins_that_nobody_asks_for_load_nothing(monkeypatch):
    monkeypatch.delenv("DIT_ACCEL", raising=False)
    plugins = ("vllm_omni", "sglang")
    code = "; ".join(f"from dit_accel.serving.{one} import register; register()" for one in plugins)
    command = [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"]
    loaded = {*subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()}
    assert {f"dit_accel.serving.{one}" for one in plugins} <= loaded
    assert not {"torch", "diffusers", *plugins} & loaded


METHODS = """
[radial]
decay_factor = 0.2
near = "half"
sink = false
block_size = 16
dense_steps = 0
dense_layers = 0

[easycache]
threshold = 1e9
warmup_steps = 1
max_consecutive = 1
"""


class CancelledError(Exception):
    """What a server's callback raises in a request that its client no longer waits for."""


SIZE = dict(height=64, width=64, num_frames=17, num_inference_steps=6, guidance_scale=3.0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def logged(caplog):
    """The lines of ours since the last call."""
    lines = [one.getMessage() for one in caplog.records if one.getMessage().startswith("dit-accel: ")]
    caplog.clear()
    assert not [line for line in lines if "\n" in line]
    return lines


@pytest.fixture
def setting(tmp_path, monkeypatch):
    """Sets what the environment variable names, text of a file or a word."""

    def put(text):
        if "\n" in text:
            (tmp_path / "serve.toml").write_text(text)
            text = str(tmp_path / "serve.toml")
        monkeypatch.setenv(VARIABLE, text)

    return put


@pytest.fixture(params=[(server, own) for server in SERVERS for own in (False, True)], ids=lambda one: "-".join(
    (one[0], "own_code" if one[1] else "stand_in")))  # fmt: skip
def start(request, caplog):
    """Starts a server around a pipeline, our plugin called as the server calls it."""
    server, own = request.param
    files = their_files(server) if own else STAND_INS[server]
    if files is None:
        pytest.skip(f"{server} is neither installed nor unpacked on the path")
    caplog.set_level(logging.INFO, "dit_accel.serving")
    caplog.set_level(logging.INFO, "vllm_omni.dit_accel")

    def started(pipe):
        SERVERS[server].plugin.register()
        SERVERS[server].plugin.register() if server == "vllm_omni" else None
        return SERVERS[server](pipe)

    with importable(server, files):
        yield started


@pytest.fixture
def plain(start, monkeypatch):
    """Sends requests to a server without methods."""
    monkeypatch.setenv(VARIABLE, " ")  # as if it were not set
    pipe = prompted_wan()
    server = start(pipe)
    assert dit_accel.attachment_of(pipe) is None
    return server.request


def fresh(start, prompts, seed, **call):
    """What a server makes of a request that is its only one."""
    return start(prompted_wan()).request(prompts, seeded(seed), **{**SIZE, **call})


def test_requests_are_those_of_a_server_of_their_own(start, setting, caplog, plain):
    dense = plain(["a kite"], seeded(), **SIZE)
    setting(METHODS)
    pipe = prompted_wan()
    server = start(pipe)
    assert "radial, easycache" in " ".join(logged(caplog))
    first = server.request(["a kite"], seeded(), **SIZE)
    assert not torch.equal(first, dense)
    (line,) = logged(caplog)
    assert line.startswith("dit-accel: radial, easycache: density 0.")
    assert "speed-up" in line
    other = dict(num_frames=33, num_inference_steps=4)
    both = server.request(["a kite", "a dog"], seeded(3), **{**SIZE, **other})
    assert torch.equal(server.request(["a kite"], seeded(), **SIZE), first)
    assert torch.equal(both, fresh(start, ["a kite", "a dog"], 3, **other))


@pytest.mark.parametrize("why", ["a step list of another length", "a kernel that fails"])
def test_what_the_methods_cannot_do_runs_plain_with_the_reason(start, setting, caplog, plain, monkeypatch, why):
    listed = why.startswith("a step")
    call = {**SIZE, "num_inference_steps": 4} if listed else SIZE
    dense = plain(["a kite"], seeded(), **call)
    setting("[staticcache]\nsteps = [1, 0, 1, 0, 1, 1]\n" if listed else METHODS.split("[easycache]")[0])
    server = start(prompted_wan())
    first = server.request(["a kite"], seeded(), **SIZE)
    logged(caplog)
    with monkeypatch.context() as patch:
        if not listed:
            patch.setattr(api, "_run", torch.ones(2).reshape)  # which takes no problem
        assert torch.equal(server.request(["a kite"], seeded(), **call), dense)
    (line,) = logged(caplog)
    assert all(word in line for word in ("without methods", *(("6", "4") if listed else ("reshape",))))
    assert torch.equal(server.request(["a kite"], seeded(), **SIZE), first)


def test_an_error_of_the_model_is_raised_at_once(start, setting, monkeypatch):
    setting(METHODS)
    pipe = prompted_wan()
    server = start(pipe)
    first = server.request(["a kite"], seeded(), **SIZE)
    ran = []
    with monkeypatch.context() as patch:
        patch.setattr(pipe.transformer.blocks[1].ffn, "forward", lambda x: ran.append(1) or torch.ones(2).reshape(3))
        with pytest.raises(RuntimeError, match="shape"):
            server.request(["a kite"], seeded(), **SIZE)
    assert len(ran) == 1
    assert torch.equal(server.request(["a kite"], seeded(), **SIZE), first)


def test_a_refused_setting_leaves_the_server_plain_with_the_reason(start, setting, caplog, plain):
    dense = plain(["a kite"], seeded(), **SIZE)
    for text, reason in (("swift", "'swift'"), ("[slg]\nlayers = [99]\n", "99")):
        setting(text)
        pipe = prompted_wan()
        server = start(pipe)
        (line,) = logged(caplog)
        assert "not attached to WanPipeline" in line
        assert reason in line
        assert dit_accel.attachment_of(pipe) is None
        assert torch.equal(server.request(["a kite"], seeded(), **SIZE), dense)
        assert not logged(caplog)


def test_a_second_pipeline_around_the_transformer_waits(setting):
    setting(METHODS)
    pipe, results, call = prompted_wan(), [], dict(SIZE, output_type="latent")
    attach_requested(pipe)

    def send(pipe, **more):
        results.append(answer(pipe, lambda: pipe("a kite", generator=seeded(), **call, **more).frames))

    def meet(pipe, index, timestep, kwargs):
        if index == 1:
            second.start()
            second.join(0.2)  # in which it would run into this run
        return {}

    second = threading.Thread(target=send, args=(twin(pipe),))
    send(pipe, callback_on_step_end=meet)
    second.join()
    assert torch.equal(*results)


def test_a_server_whose_parts_moved_goes_on(monkeypatch, caplog):
    monkeypatch.setenv(VARIABLE, "balanced")
    with importable("vllm_omni", {vllm_omni.ADAPTER: Path(__file__)}):
        vllm_omni.register()
    (line,) = logged(caplog)
    assert "DiffusersAdapterPipeline" in line


@pytest.mark.parametrize("server", SERVERS)
def test_the_plugins_are_found_by_the_server_and_stand_ins_have_its_signatures(server):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    group = {"vllm_omni": "vllm_omni.general_plugins", "sglang": "sglang.multimodal_gen.plugins"}[server]
    ((name, place),) = project["project"]["entry-points"][group].items()
    assert name == "dit_accel"  # what VLLM_PLUGINS and SGLANG_PLUGINS list
    assert pkgutil.resolve_name(place) is SERVERS[server].plugin.register
    theirs = their_files(server)
    if theirs is None:
        pytest.skip(f"{server} is neither installed nor unpacked on the path")
    known = {name: where for where in theirs.values() for name, where in signatures(where).items()}
    made_up = {name: where for where in STAND_INS[server].values() for name, where in signatures(where).items()}
    assert made_up
    assert {name: known.get(name) for name in made_up} == made_up


def signatures(path):
    """Class.method -> names of its arguments, of a file."""
    return {
        f"{owner.name}.{one.name}": [arg.arg for arg in (*one.args.args, *one.args.kwonlyargs)]
        for owner in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(owner, ast.ClassDef)
        for one in owner.body
        if isinstance(one, ast.FunctionDef) and one.name != "_wrapped"
    }


KITE, BOTH = ("a kite",), ("a kite", "a dog")
KINDS = [
    (KITE, 17, 4, ""), (BOTH, 9, 3, "cancelled"), (BOTH, 17, 3, ""), (KITE, 9, 4, "wrong size"),
    (KITE, 17, 3, "interrupted"), (("a dog",), 9, 6, ""), (BOTH, 9, 6, "interrupted"), (KITE, 9, 3, "cancelled"),
]  # fmt: skip
"""Requests of several kinds: prompts, frames and steps, and how they end."""


def send(server, prompts, frames, steps, end):
    """Send a request, and return its latents, or the name of its error."""

    def stop(pipe, index, timestep, kwargs):
        if index == 1 and end == "cancelled":
            raise CancelledError
        pipe._interrupt = index == 1 and end == "interrupted"
        return {}

    call = {**SIZE, "num_frames": frames, "num_inference_steps": steps, "callback_on_step_end": stop}
    if end == "wrong size":
        call["height"] = 65
    try:
        return server.request(list(prompts), seeded(len(prompts)), **call)
    except (CancelledError, ValueError) as error:
        return type(error).__name__


def held():
    """Bytes of all tensors that are alive."""
    gc.collect()
    storages = {
        one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
        for one in gc.get_objects()
        if type(one) in (torch.Tensor, torch.nn.Parameter)
    }
    return sum(storages.values())


@pytest.mark.parametrize(
    "kinds", [KINDS[:5], pytest.param(random.Random(0).choices(KINDS, k=200), marks=pytest.mark.slow)], ids=len
)
def test_many_requests_at_once_are_as_if_alone(kinds, start, setting):
    setting(METHODS)
    alone = {kind: send(start(prompted_wan()), *kind) for kind in dict.fromkeys(kinds)}
    pipe = prompted_wan()
    server = start(pipe)
    before, resident = held(), resident_mib()
    one = send(server, *kinds[0])
    beside = 0 if isinstance(one, str) else one.untyped_storage().nbytes()
    with ThreadPoolExecutor(8) as pool:
        outputs = [*pool.map(lambda kind: send(server, *kind), kinds)]
    assert not [kind for kind, out in zip(kinds, outputs, strict=True) if not same(out, alone[kind])]
    assert {"CancelledError", "ValueError"} <= {one for one in alone.values() if isinstance(one, str)}
    del outputs
    assert held() - before <= beside + 1024  # nothing waits for the next request
    assert resident_mib() - resident < 64


def same(one, other):
    return one == other if isinstance(one, str) or isinstance(other, str) else torch.equal(one, other)


def resident_mib():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


# The block of modular pipelines

SETTING = "[easycache]\nthreshold = 1e9\nwarmup_steps = 1\nmax_consecutive = 1\n"


@pytest.fixture(params=["WanModularPipeline", "FluxModularPipeline"])
def made(request, tmp_path):
    """A pipeline with the block in front, its call without the setting, and the path of a setting."""
    (tmp_path / "cache.toml").write_text(SETTING)
    pipe, call = stock_pipeline(request.param)
    blocks = pipe.blocks
    blocks.sub_blocks.insert("dit_accel", AttachMethods("none"), 0)
    with_block = type(pipe)(blocks=blocks)
    with_block.update_components(**{name: part for name, part in pipe.components.items() if part is not None})
    if not hasattr(with_block, "vae"):
        with_block.vae = pipe.vae  # which tells the latents' scale
    call = {**call, "num_inference_steps": 4}
    return with_block, lambda **more: with_block(**call, **more, generator=torch.Generator().manual_seed(0)), tmp_path


def test_each_call_has_the_setting_that_it_names_and_what_others_attached_stays(made):
    pipe, run, folder = made
    path, plain = str(folder / "cache.toml"), run()
    assert dit_accel.attachment_of(pipe) is None
    cached = run(dit_accel=path)
    attachment = dit_accel.attachment_of(pipe)
    assert list(attachment.report().methods) == ["easycache"]
    assert not torch.equal(cached, plain)
    assert torch.equal(run(dit_accel=path), cached)
    assert dit_accel.attachment_of(pipe) is attachment
    run(dit_accel="careful")
    assert dit_accel.attachment_of(pipe) is not attachment
    assert torch.equal(run(dit_accel="none"), plain)
    assert dit_accel.attachment_of(pipe) is None
    with dit_accel.attach(pipe, EasyCache()) as others:
        with pytest.raises(AttachError, match="transformer"):
            run(dit_accel="careful")
        assert dit_accel.attachment_of(pipe) is others
    with pytest.raises(ConfigError, match="'swift'"):
        run(dit_accel="swift")


def test_alone_it_expects_the_transformers_that_it_is_told():
    class Attaching(SequentialPipelineBlocks):
        model_name = "wan"
        block_classes = (AttachMethods,)
        block_names = ("dit_accel",)

    assert not Attaching().expected_components
    named = AttachMethods("fast", ("transformer", "transformer_2"))
    assert [one.name for one in named.expected_components] == ["transformer", "transformer_2"]
    assert [one.name for one in named.inputs] == ["dit_accel"]
    assert "transformers" in named.description
