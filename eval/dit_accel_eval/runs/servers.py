"""Servers as arms: SGLang and vLLM-Omni make a clip by HTTP, with the prompt, seed, steps and size of the suite."""

import base64
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel import ConfigError

from .clip_files import ClipFile, encoder_like, form_of
from .counting import Counts
from .model import ModelRun

KINDS = {"url": str, "timeout": (int, float), "extra": dict}
"""Option of a server -> what it must be."""

PASSED = ("num_frames", "guidance_scale", "guidance_scale_2", "true_cfg_scale", "negative_prompt")
"""Arguments of a call that requests have a field for, by the same name; height and width are its ``size``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server: where it listens, the seconds to wait for it, and further fields of each request."""

    name: str
    url: str
    timeout: float = 1800.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, rival: Mapping[str, Mapping[str, Any]]) -> "Server":
        """Return the server of an arm's table, whose options are of `KINDS`."""
        ((name, options),) = rival.items()
        if not str(options.get("url")).startswith(("http://", "https://")):
            raise ConfigError(f"{name} has url {options.get('url')!r}; say where it listens: http://localhost:30000")
        return cls(name=name, **options)

    def check(self, call: Mapping[str, Any]) -> None:
        """Refuse a call that requests can't say, and a server that does not answer."""
        if lost := sorted({*call} - {*PASSED, "height", "width"}):
            raise ConfigError(f"requests to {self.name} have no field for {', '.join(lost)}; leave it out of the call")
        self._answer("get", "/health", wait=10, refuse=False)

    def run(self, *, prompt: str, seed: int, steps: int, call: Mapping[str, Any]) -> ModelRun:
        """Have one clip made, timed from the request to the last byte; `ConfigError` where none of its size comes."""
        fields = {"generator_device": "cpu", **self.extra}  # where the suite's own noise is made
        fields |= {"prompt": prompt, "seed": seed, "num_inference_steps": steps}
        fields |= {"size": f"{call['width']}x{call['height']}", **{key: call[key] for key in PASSED if key in call}}
        kind = "mp4" if "num_frames" in call else "png"
        make = self._picture if kind == "png" else self._job if self.name == "sglang" else self._form
        began = time.perf_counter()
        content = make(fields)
        seconds = time.perf_counter() - began
        with tempfile.TemporaryDirectory(prefix="dit-accel-served-") as folder:
            file = ClipFile(name=self.name, path=Path(folder) / f"clip.{kind}")
            file.path.write_bytes(content)
            try:
                form, levels = form_of(file), file.levels()
            except (ConfigError, OSError, ValueError):
                raise self._error(f"answered with {len(content)} bytes that are no {kind}") from None
            wanted = [call.get("num_frames", 1), call["height"], call["width"]]
            if [*levels.shape[:3]] != wanted:
                raise self._error(f"made a clip of frames, height, width {levels.shape[:3]}, asked for {wanted}")
            encoder = encoder_like(file, form, levels)
        frames, unknown = np.divide(levels, 255, dtype=np.float32), Counts(blocks=math.nan, attention=math.nan)
        return ModelRun(frames=frames, counts=unknown, attended=math.nan, seconds=seconds, encoder=encoder)

    def _picture(self, fields: Mapping[str, Any]) -> bytes:
        wanted = {**fields, "n": 1, "response_format": "b64_json", "output_format": "png"}
        answer = self._json("post", "/v1/images/generations", json=wanted)
        try:
            return base64.b64decode(answer["data"][0]["b64_json"])
        except (KeyError, IndexError, TypeError, ValueError):
            raise self._error(f"answered without a picture: {str(answer)[:100]}") from None

    def _job(self, fields: Mapping[str, Any]) -> bytes:
        """Return a video's file as SGLang gives it: by a job whose state is polled."""
        until = time.monotonic() + self.timeout
        job = self._json("post", "/v1/videos", json=fields)
        at = f"/v1/videos/{job.get('id')}"
        while job.get("status") in ("queued", "in_progress") and time.monotonic() < until:
            time.sleep(0.05)
            job = self._json("get", at)
        if job.get("status") != "completed":
            raise self._error(f"made no clip in {self.timeout:g} s: {job.get('error') or job}")
        return self._answer("get", f"{at}/content").content

    def _form(self, fields: Mapping[str, Any]) -> bytes:
        """Return a video's file as vLLM-Omni gives it: in answer to a form."""
        return self._answer("post", "/v1/videos/sync", files={key: (None, str(fields[key])) for key in fields}).content

    def _json(self, verb: str, at: str, **body: Any) -> dict[str, Any]:
        answer = self._answer(verb, at, **body)
        try:
            return dict(answer.json())
        except (ValueError, TypeError):
            raise self._error(f"answered with no JSON object: {answer.text[:100]!r}") from None

    def _answer(self, verb: str, at: str, *, wait: float | None = None, refuse: bool = True, **body: Any) -> Any:
        import requests

        try:
            answer = requests.request(verb, self.url.rstrip("/") + at, timeout=wait or self.timeout, **body)
        except requests.RequestException as error:
            raise self._error(
                f"does not answer ({type(error).__name__}); start it, or correct url or timeout"
            ) from None
        if refuse and not answer.ok:
            raise self._error(f"answered {answer.status_code} to {at}: {' '.join(answer.text.split())[:200]}")
        return answer

    def _error(self, what: str) -> ConfigError:
        return ConfigError(f"{self.name} at {self.url} {what}")
