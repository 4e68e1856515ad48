"""Servers as arms of a suite: what SGLang and vLLM-Omni are sent, and what is said of each wrong answer."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from dit_accel_eval.metrics.pixels import psnr
from dit_accel_eval.runs.results import result_lines
from dit_accel_eval.runs.servers import Server
from dit_accel_pipelines.generation.media import write_media
from fake_model import ARM, HEAD, FakeModel, command, faked, told

from dit_accel import ConfigError

CALL = {"height": 16, "width": 16, "num_frames": 3, "guidance_scale": 4.0}
PICTURE = {"height": 16, "width": 16}
FRAMES = np.random.default_rng(0).integers(90, 110, (3, 16, 16, 3), dtype=np.uint8)


class Sized(FakeModel):
    call = CALL


fake = pytest.fixture(lambda monkeypatch: (yield from faked(monkeypatch, Sized)))


@pytest.fixture
def listening(tmp_path):
    """A stand-in for both servers: ``sent`` holds what it got, ``answers`` path -> (status, bytes)."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.server.sent.append((self.path, body.decode()))
            status, content = self.server.answers.get(self.path, (404, b"gone"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    clips = tmp_path / "clip.mp4", tmp_path / "clip.png"
    for clip, frames in zip(clips, (FRAMES, FRAMES[:1]), strict=True):
        write_media(clip, frames, fps=8)
    video, picture = (clip.read_bytes() for clip in clips)
    image = json.dumps({"data": [{"b64_json": base64.b64encode(picture).decode()}]}).encode()
    answers = {"/v1/videos": b'{"id": "7", "status": "queued"}', "/v1/videos/7": b'{"status": "completed"}'}
    answers |= {"/v1/videos/7/content": video, "/v1/videos/sync": video, "/v1/images/generations": image}
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.sent, server.answers = [], {path: (200, content) for path, content in answers.items()}
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield server
        server.shutdown()


def made_by(name, server, call, **options):
    return Server.of({name: {"url": server.url, **options}}).run(prompt="a kite", seed=3, steps=5, call=call)


def test_both_servers_are_sent_what_the_suite_says(listening):
    sent = {"prompt": "a kite", "seed": 3, "num_inference_steps": 5, "size": "16x16", "generator_device": "cpu"}
    for name, at in (("sglang", "/v1/videos"), ("vllm-omni", "/v1/videos/sync")):
        run = made_by(name, listening, CALL, extra={"enable_teacache": True})
        assert psnr(run.frames, FRAMES / np.float32(255)) > 30
        assert str(run.encoder).startswith("h264 yuv420p, CRF")
        more = {"num_frames": 3, "guidance_scale": 4.0, "enable_teacache": True}
        path, body = next(entry for entry in listening.sent if "a kite" in entry[1])
        parts = [f'name="{key}"\r\n\r\n{value}\r\n' in body for key, value in (sent | more).items()]
        assert (path, name == "sglang" and json.loads(body) == sent | more) in ((at, True), (at, not all(parts)))
        picture = made_by(name, listening, PICTURE)
        assert (np.array_equal(picture.frames * 255, FRAMES[:1]), picture.encoder) == (True, None)
        path, body = listening.sent[-1]
        wanted = {"n": 1, "response_format": "b64_json", "output_format": "png"}
        assert (path, json.loads(body)) == ("/v1/images/generations", sent | wanted)
        listening.sent.clear()


@pytest.mark.parametrize(
    ("name", "call", "wrong", "message"),
    [
        ("vllm-omni", CALL, {"/v1/videos/sync": (422, b'{"detail":\n"seed"}')}, r'422 to .*"detail": "seed"'),
        ("vllm-omni", CALL, {"/v1/videos/sync": (200, b"")}, r"0 bytes .* no mp4"),
        ("vllm-omni", CALL | {"height": 32}, {}, r"\(3, 16, 16\), .*\[3, 32, 16\]"),
        ("sglang", CALL, {"/v1/videos": (200, b"<html>")}, "JSON object: '<html>'"),
        ("sglang", CALL, {"/v1/videos/7": (200, b'{"status": "failed", "error": "no memory"}')}, "no memory"),
        ("sglang", CALL, {"/v1/videos/7": (200, b'{"id": "7", "status": "queued"}')}, r"in 0\.2 s"),
        ("sglang", CALL, {"/v1/videos/7/content": (404, b"gone")}, r"404 to /v1/videos/7/content: gone"),
        ("sglang", PICTURE, {"/v1/images/generations": (200, b'{"data": []}')}, r"picture: \{'data': \[\]\}"),
    ],
)
def test_a_wrong_answer_is_one_line(listening, name, call, wrong, message):
    listening.answers.update(wrong)
    with pytest.raises(ConfigError, match=message) as caught:
        made_by(name, listening, call, timeout=0.2)
    assert str(caught.value).startswith(f"{name} at {listening.url} ")
    assert "\n" not in str(caught.value)


def suite_of(folder, url, more="timed = true\n", call="", arm=""):
    served = f'[[arm]]\nname = "served"\nnum_inference_steps = 6\nrival = {{ sglang = {{ url = "{url}" }} }}\n{arm}'
    sizes = f"[call]\nheight = 16\nwidth = 16\nnum_frames = 3\n{call}\n"
    (folder / "s.toml").write_text(HEAD + "reference_steps = 30\n" + more + sizes + served + ARM)
    return command("run", folder / "s.toml", "--out", folder / "s.jsonl", "--cache", folder / "cache")


def test_a_served_arm_stands_beside_the_others_by_its_whole_time(tmp_path, listening, fake):
    done = suite_of(tmp_path, listening.url)
    assert done.exit_code == 0, done.stderr
    line = next(line for line in result_lines(tmp_path / "s.jsonl") if line.arm == "served")
    assert line.steps_in_time == 6 * line.seconds / line.dense_seconds
    assert (line.value("work"), line.raw["encoder"][:4], "encoding-alone" in line.metrics) == (None, "h264", True)
    assert "| served | " in done.stdout
    assert "nan" not in done.stdout
    shown = command("report", tmp_path / "s.jsonl", "-o", tmp_path / "s.html", "--json", tmp_path / "s.json")
    assert (shown.exit_code, "NaN" in (tmp_path / "s.json").read_text()) == (0, False), shown.output


def test_what_a_server_can_not_do_is_refused_before_anything_runs(tmp_path, listening, fake):
    for options, message in (
        ({"more": ""}, "set timed = true"),
        ({"call": "max_sequence_length = 3"}, "have no field for max_sequence_length"),
        ({"url": "http://127.0.0.1:9"}, "sglang at http://127.0.0.1:9 does not answer (ConnectionError)"),
        ({"url": "127.0.0.1"}, "say where it listens"),
        ({"url": 'http://a", port = "3'}, "rival = sglang has an unknown key 'port'"),
        ({"arm": "flow_shift = 3.0\n"}, "rival = sglang stands beside flow_shift"),
        ({"arm": 'solver = "euler"\n'}, "rival = sglang stands beside solver"),
    ):
        done = suite_of(tmp_path, **{"url": listening.url, **options})
        assert (done.exit_code, fake.made) == (2, [])
        assert message in told(done)
