"""One seed dense and with the methods: `Attachment.check` and `suspended`, and the page of `dit-accel ui`."""

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from dit_accel_pipelines.generation import side_by_side, ui
from dit_accel_pipelines.generation.request import check_words
from dit_accel_pipelines.generation.side_by_side import Comparing, SideBySide, Stopped, Watched
from PIL import Image
from tiny_stock import stock_pipeline
from typer.testing import CliRunner
from wan_tiny import generate

import dit_accel
from dit_accel import AttachError, ConfigError, EasyCache, RadialAttention, SparseD, StaticCache
from dit_accel.adapters.embedded import embedded_names
from dit_accel.attachment import check
from dit_accel.cli.app import app
from dit_accel.methods.toml import to_toml
from dit_accel.report import clock

CALL = dict(num_frames=9, height=32, width=32, num_inference_steps=6, guidance_scale=3.0, max_sequence_length=16)
CACHE = StaticCache(every=2, warmup_steps=1, last_steps=0)


def test_two_runs_of_one_seed_are_compared(pipe, tmp_path):
    def made():
        return pipe("a red circle", generator=torch.Generator().manual_seed(3), output_type="np", **CALL).frames[0]

    sparse = SparseD(rest="cached", dense_steps=0, dense_layers=0, block_size=16)
    with dit_accel.attach(pipe, CACHE, sparse) as attachment:
        result, again = attachment.check("a red circle", seed=3, **CALL), made()
    assert np.array_equal(result.dense, made())
    assert np.array_equal(result.accelerated, again)
    error = np.mean((result.dense - result.accelerated) ** 2)
    assert result.metrics["psnr"] == pytest.approx(-10 * np.log10(error), abs=1e-3)
    assert {*result.metrics, *result.not_measured} == {"psnr", "ssim", "lpips@alex"}
    assert "same seed" in str(result)
    assert "error of attention" in str(result)
    assert [*result.to_dict()["sections"]] == ["sparsed"]  # the cache tells nothing of errors
    result.save(tmp_path / "check.png")
    assert Image.open(tmp_path / "check.png").width > 100
    with pytest.raises(ConfigError, match=r"check\.mp4"):
        result.save(tmp_path / "check.mp4")


class Ticks:
    """A clock that moves when it is told to: a forward takes a second, other parts of a call theirs."""

    now = 0.0

    def taking(self, run, seconds):
        def timed(*args, **kwargs):
            self.now += seconds
            return run(*args, **kwargs)

        return timed


@pytest.fixture
def ticks(pipe, monkeypatch):
    ticks = Ticks()
    monkeypatch.setattr(clock, "now", lambda: ticks.now)
    for of, name, seconds in (
        (pipe.text_encoder, "forward", 1.0), (pipe.transformer.blocks[0], "forward", 1.0), (pipe.vae, "decode", 3.0),
        (pipe.scheduler, "step", 0.25),
    ):  # fmt: skip
        monkeypatch.setattr(of, name, ticks.taking(getattr(of, name), seconds))
    return ticks


def test_the_measured_speedup_is_that_of_a_stopwatch_around_the_call(pipe, ticks):
    def seconds():
        begun = ticks.now
        pipe("a red circle", output_type="np", **CALL)
        return ticks.now - begun

    dense = seconds()
    with dit_accel.attach(pipe, CACHE) as attachment:
        for _ in range(2):
            taken, timing = seconds(), attachment.report().timing
            assert timing.call == pytest.approx(taken)
            assert timing.speedup == pytest.approx(dense / taken, rel=0.02)
            assert timing.loop_speedup > timing.speedup
        with pytest.raises(ValueError, match="divisible"):
            pipe("a red circle", **{**CALL, "height": 33})
        config = pipe.transformer.config
        latents, text = torch.randn(1, config.in_channels, 3, 4, 4), torch.randn(1, 6, config.text_dim)
        pipe.transformer(latents, torch.tensor([999.0]), text)
        assert attachment.report().timing.call is None  # a loop by hand
    assert not {"check_inputs", "maybe_free_model_hooks"} & {*vars(pipe)}


def test_a_picture_is_one_frame_and_methods_that_change_nothing_are_equal(pipe):
    with dit_accel.attach(pipe, EasyCache(threshold=0.0)) as attachment:
        result = attachment.check("a red circle", **CALL)
    assert np.array_equal(result.dense, result.accelerated)
    flux, call = stock_pipeline("FluxPipeline")
    call["num_inference_steps"] = 4
    with dit_accel.attach(flux, CACHE) as attachment:  # embeddings stand for a prompt
        result = attachment.check(**{key: value for key, value in call.items() if key != "output_type"})
    assert len(result.dense) == len(result.accelerated) == 1
    assert not np.array_equal(result.dense, result.accelerated)


def test_short_runs_are_made_twice_and_the_faster_one_counts(pipe, ticks, monkeypatch):
    call = {**CALL, "guidance_scale": 1.0}
    monkeypatch.setattr(check, "SHORT", 33.0)  # 1 for the text, 3 to decode, 6 steps of 1.25 s; 2.5 s are saved
    with dit_accel.attach(pipe, StaticCache(every=2, warmup_steps=2, last_steps=0)) as attachment:
        slow, decode = iter([9.0, 0.0, 0.0, 5.0, 0.0, 0.0]), pipe.vae.decode
        monkeypatch.setattr(pipe.vae, "decode", lambda *a, **k: ticks.taking(decode, next(slow))(*a, **k))
        result = attachment.check("a red circle", **call)
        assert (result.dense_seconds, result.accelerated_seconds, result.runs) == (11.5, 9.5, 2)
        assert str(result).startswith("the faster of 2 runs each, same seed: 9.5 s instead of 11.5 s in the whole call")
        monkeypatch.setattr(check, "SHORT", 20.0)
        assert attachment.check("a red circle", **call).runs == 1


def test_suspended_methods_are_off_inside_and_on_again_behind(pipe):
    plain, seen = generate(pipe), []
    with dit_accel.attach(pipe, CACHE, RadialAttention(block_size=16, dense_steps=1)) as attachment:
        with_methods = generate(pipe)
        with attachment.observe(seen.append):
            with attachment.suspended():
                assert torch.equal(generate(pipe), plain)
                assert dit_accel.attachment_of(pipe) is None
                assert not seen
            assert dit_accel.attachment_of(pipe) is attachment
            assert torch.equal(generate(pipe), with_methods)
            assert seen
        with pytest.raises(KeyError), attachment.suspended():
            raise KeyError
        assert torch.equal(generate(pipe), with_methods)


def test_what_cannot_be_checked_is_refused(pipe):
    with dit_accel.attach(pipe.transformer, CACHE) as attachment, pytest.raises(AttachError, match="pipeline"):
        attachment.check("a red circle")
    attachment = dit_accel.attach(pipe, CACHE)
    attachment.detach()
    with pytest.raises(AttachError, match="detached"):
        attachment.check("a red circle", **CALL)


ROOT = Path(__file__).resolve().parents[2]
SMALL = {"height": 32, "width": 32, "num_frames": 5, "device": "cpu"}
PROMPT = "a red circle moving right"
CHOSEN = {"model": None, "preset": "fast", "config": "", "num_inference_steps": 10, "seed": 0}


def watched(told: list[Any] | None = None) -> Watched:
    return Watched(lambda *now: told.append(now) if told is not None else None, threading.Event())


def compare(comparing: Comparing, folder: Path, **changes: Any) -> SideBySide:
    given = {**CHOSEN, "num_inference_steps": 4, "stages": watched(), **changes}
    return comparing(given.pop("prompt", PROMPT), folder, **given)


@pytest.fixture(scope="module")
def comparing() -> Comparing:
    """Holds the model that was loaded for the first run."""
    return Comparing(**SMALL)


@pytest.mark.slow
def test_both_runs_and_their_difference_become_clips_and_the_model_is_loaded_once(comparing, tmp_path):
    stages: list[Any] = []
    result = compare(Comparing(**SMALL), tmp_path, stages=watched(stages))
    paths = (result.dense, result.accelerated, result.difference)
    assert [path.name for path in paths] == ["dense.mp4", "accelerated.mp4", "difference.mp4"]
    assert imageio.imread(result.dense).shape == (5, 256, 256, 3)
    assert imageio.imread(result.difference).mean() < imageio.imread(result.dense).mean()
    assert result.check.metrics["psnr"] > 20
    # which run took less is the machine's affair
    assert min(result.check.dense_seconds, result.check.accelerated_seconds) > 0
    assert "measured speed-up" in result.report
    assert [now for now in stages if now[0] == "with methods: denoising"][-1] == ("with methods: denoising", 4, 4)
    assert {now[0] for now in stages} >= {"loading the model", "trying: denoising", "dense: denoising"}
    first, stages = compare(comparing, tmp_path), []
    nothing = to_toml([EasyCache(threshold=0)])
    second = compare(comparing, tmp_path, preset="none", config=nothing, stages=watched(stages))
    assert "loading the model" not in {now[0] for now in stages}
    assert second.check.metrics["psnr"] == 100  # a threshold of 0 skips nothing, and the first left nothing behind
    assert (second.check.dense == first.check.dense).all()


def test_a_picture_becomes_a_png(tmp_path):
    result = compare(Comparing(height=64, width=64, device="cpu"), tmp_path, model="flux-tiny", num_inference_steps=2)
    assert result.difference.name == "difference.png"
    assert imageio.imread(result.accelerated).shape == (256, 256, 3)


def test_what_can_t_be_met_is_one_sentence(comparing, tmp_path, capsys):
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate\nmore")

    video, picture = comparing, Comparing(device="cpu")
    for runs, changes, message in (
        (video, {"prompt": " "}, "prompt"),
        (video, {"prompt": "a purple elephant"}, "elephant"),
        (video, {"preset": "none"}, "none"),
        (video, {"preset": "fastest"}, "'fastest'"),
        (video, {"config": "[easycache"}, "TOML"),
        (picture, {"config": "[radial]\n", "model": "flux-tiny"}, "radial"),
        (video, {"config": "[easy]\n"}, "'easy'"),
        (video, {"num_inference_steps": 0}, "0"),
        (video, {"seed": -1}, "-1"),
        (video, {"model": "no-such-model"}, "no-such-model"),
        (fails, {}, "the run failed: RuntimeError: CUDA out of memory. Tried to allocate"),
    ):
        error = told_error(runs, tmp_path, **changes)
        assert message in error
        assert "\n" not in error
        assert "--" not in error.split(";")[0]
    assert error.endswith(message)
    assert "Traceback" not in capsys.readouterr().err


def test_what_names_a_file_or_a_model_is_refused_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(side_by_side, "load_pipeline", None)
    for config, value in (
        ('[autoguidance]\nweak = "owner/name"', "autoguidance.weak.*owner/name"),
        ('[lite]\nthresholds_file = "/etc/passwd"', "lite.thresholds_file.*/etc/passwd"),
        ('[profilingcache]\nblocks = "/dev/zero.json"', "profilingcache.blocks.*/dev/zero.json"),
        ('[softpag]\nheads = ["L2", "/dev/zero.json, L1"]', "softpag.heads.*/dev/zero.json"),
    ):
        with pytest.raises(ConfigError, match=value):
            compare(Comparing(**SMALL), tmp_path, preset="none", config=config)
    for prompt, model in itertools.product(ui.EXAMPLES, embedded_names()):
        check_words(prompt, model)
    text = '[softpag]\nheads = ["L2", "L1"]\n[nag]\nnegative_prompt = "a star"'
    with pytest.raises(TypeError, match="None"):
        compare(Comparing(**SMALL), tmp_path, config=text)


def told_error(comparing: Any, folder: Path, **changes: Any) -> str:
    """What the page shows of an error, where the next result stands."""
    options = {**CHOSEN, **changes}
    prompt = options.pop("prompt", PROMPT)
    result = ui._run(comparing, lambda *_, **__: None, threading.Event(), folder, prompt, options)
    message, *others = ui._shown(SimpleNamespace(skip=lambda: "as it was"), result)
    assert set(others) == {"as it was"}
    return message


def test_a_run_that_is_stopped_ends_before_its_next_step_and_the_next_one_goes(comparing, tmp_path):
    stop, seen = threading.Event(), list[str]()

    def tell(what: str, done: int, total: int | None) -> None:
        seen.append(what)
        if (what, done) == ("with methods: denoising", 2):
            stop.set()

    with pytest.raises(Stopped):
        compare(comparing, tmp_path, stages=Watched(tell, stop))
    assert seen.count("with methods: denoising") == 3
    assert compare(comparing, tmp_path).check.metrics["psnr"] > 20


def test_runs_wait_for_each_other(comparing, tmp_path):
    order = list[str]()

    def one(name: str) -> None:
        stages = Watched(lambda what, *_: order.append(name) if "denoising" in what else None, threading.Event())
        (tmp_path / name).mkdir()
        compare(comparing, tmp_path / name, stages=stages, num_inference_steps=2)

    with ThreadPoolExecutor() as pool:
        assert [*pool.map(one, "ab")] == [None, None]
    assert sum(first != second for first, second in itertools.pairwise(order)) == 1


def test_a_gradio_that_lacks_or_is_too_old_and_a_port_that_is_taken_are_refused_before_anything_is_loaded(monkeypatch):
    old = SimpleNamespace(__version__="4.44.1")
    for module, message in ((None, "pip install ./kernels ./assets '.[ui]'"), (old, "found 4.44.1")):
        monkeypatch.setitem(sys.modules, "gradio", module)
        result = CliRunner().invoke(app, ["ui"])
        assert (result.exit_code, message in result.stderr.replace("\n", " ")) == (2, True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"port \d+ .*--port"):
            ui._check_port("127.0.0.1", taken.getsockname()[1])


@pytest.fixture
def address() -> Iterator[str]:
    """A page that is served until the test ends, by Ctrl-C."""
    pytest.importorskip("gradio", reason="the page needs Gradio (the extra ui)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "pipelines", "eval", "assets"))
    served = subprocess.Popen(
        [sys.executable, "-m", "dit_accel", "ui", "--port", str(port), "--device", "cpu"],
        env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert served.stderr is not None
    try:
        assert f"http://127.0.0.1:{port}" in served.stderr.readline()
        yield f"http://127.0.0.1:{port}/"
        served.send_signal(signal.SIGINT)
        assert served.wait(10) == 130
        assert "Traceback" not in served.stderr.read()
    finally:
        served.kill()


@pytest.mark.slow
def test_the_page_listens_to_this_machine_alone(address):
    own = {found[4][0] for found in socket.getaddrinfo(socket.gethostname(), None)} - {"127.0.0.1", "::1"}
    assert urllib.request.urlopen(address).status == 200
    for other in (one for one in own if ":" not in one and not one.startswith("127.")):
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((other, int(address.rstrip("/").rpartition(":")[2])), timeout=5)


READY = "document.querySelector('#told').innerText.includes('times as fast')"
PLAYS = "all => all.filter(one => one.readyState >= 2 && one.videoWidth == 256).length"


@pytest.mark.slow
def test_in_a_browser_both_clips_play_beside_their_times(address):
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with api.sync_playwright() as play:
        if chromium is None and not Path(play.chromium.executable_path).exists():
            pytest.skip("no browser: playwright install chromium")
        browser = play.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-background-networking"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.fill("#prompt textarea", "")
        page.click("#compare")
        page.wait_for_function("document.querySelector('#told').innerText.includes('a prompt is needed')")
        page.click(f"text={ui.EXAMPLES[1]}")
        page.wait_for_function(f"document.querySelector('#prompt textarea').value == '{ui.EXAMPLES[1]}'")

        page.fill("#prompt textarea", PROMPT)
        page.fill("#num_inference_steps input[type=number]", "100")
        page.click("#compare")
        page.wait_for_function("document.body.innerText.includes('denoising')", timeout=120_000)
        page.click("#stop")
        page.wait_for_function("document.querySelector('#told').innerText.includes('Stopped')", timeout=60_000)

        page.fill("#num_inference_steps input[type=number]", "10")
        page.click("#compare")
        page.wait_for_function(READY, timeout=300_000)
        page.wait_for_function(f"() => ({PLAYS})([...document.querySelectorAll('video')]) == 3")
        told = page.inner_text("#told")
        assert all(word in told for word in ("dense", "with methods", "PSNR"))
        assert "a prompt is needed" not in page.inner_text("body")
        assert "measured speed-up" in page.input_value("#report textarea")
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        browser.close()
    assert {url.partition("/")[0] for url in asked} <= {"http:", "data:", "blob:"}
    assert all(url.startswith((address, "data:", "blob:")) for url in asked)
