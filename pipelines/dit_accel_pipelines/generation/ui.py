"""The command `ui`: a page on which a prompt is generated dense and with methods, side by side, with times and loss."""

import html
import os
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from dit_accel.cli.console import TALK, print_error, warn
from dit_accel.errors import ConfigError, DitAccelError, MissingBackend, install
from dit_accel.files import check_room

from .options import Device, Dtype, Model, Offload, help_and_default

FIRST = "Compare generates twice, first dense; the first run of a model loads it."
STOPPED = "Stopped."
FIELDS = ("preset", "model", "num_inference_steps", "seed")  # options of a request that the page offers
EXAMPLES = ["a red circle moving right", "a green square on a navy background", "a red circle on a navy background"]
TOML = "[easycache]\nthreshold = 0.1"
MOST_WAITING = 16  # runs behind the one that is on


def serve_page(
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    offload: Offload = "none",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 7860,
    share: Annotated[bool, typer.Option("--share", help="Also ask Gradio for a public link.")] = False,
) -> None:
    """Serve a page that shows a prompt dense and with methods, side by side.

    It shows both clips or pictures, five times their difference, the seconds
    of each, PSNR and the report. Runs wait for each other. Offered are the
    embedded models and the one that is named. It needs the extra `ui` (Gradio),
    listens to this machine alone unless --host is given, and reports to nobody.
    Ctrl-C ends it.

    \b
    Examples:
      dit-accel ui
      dit-accel ui --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --offload model
    """
    _require_gradio()
    from dit_accel.adapters.model_files import model_source
    from dit_accel.attachment.check import require_tools

    from .media import check_encoder
    from .request import EMBEDDED
    from .side_by_side import SHOWN_BYTES, Comparing

    model_source(model or EMBEDDED)  # a misspelt name is refused before the page stands
    require_tools()
    check_encoder("the page needs", "compare pictures with generate --check")
    check_room(tempfile.gettempdir(), SHOWN_BYTES, "the clips of a run take")
    _check_port(host, port)
    with tempfile.TemporaryDirectory(prefix="dit-accel-ui-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = make_page(Comparing(device=device, dtype=dtype, offload=offload), Path(folder), model or EMBEDDED)
        if share or host not in ("127.0.0.1", "localhost", "::1"):
            warn("whoever reaches this page can run generations on this machine")
        page.queue(default_concurrency_limit=1, max_size=MOST_WAITING)
        _, local, public = page.launch(
            server_name=host, server_port=port, share=share, quiet=True, prevent_thread_lock=True,
            ssr_mode=False, footer_links=[],
        )  # fmt: skip
        TALK.print(f"the page is at {local}{f' and {public}' if public else ''}; Ctrl-C ends it", soft_wrap=True)
        threading.Event().wait()


def make_page(comparing: Callable[..., Any], folder: Path, model: str) -> Any:
    """Return the page, `gradio.Blocks`: ``comparing`` makes both runs, into a folder of their own within ``folder``."""
    import gradio  # pyright: ignore[reportMissingImports]

    from dit_accel.adapters.embedded import embedded_names
    from dit_accel.methods.presets import NAMES

    running: dict[str, threading.Event] = {}
    models = dict.fromkeys([model, *embedded_names()])

    def compare(
        request: gradio.Request, progress: Any = gradio.Progress(), *inputs: Any,  # noqa: B008 - Gradio looks there
    ) -> list[Any]:  # fmt: skip
        prompt, config, *values = inputs
        whole = [value if isinstance(value, str) else int(value or 0) for value in values]
        choices = {"config": config, **dict(zip(FIELDS, whole, strict=True))}
        session = str(request.session_hash)
        running[session] = event = threading.Event()
        try:
            return _shown(gradio, _run(comparing, progress, event, folder, prompt, choices))
        finally:
            if running.get(session) is event:  # a run that was stopped ends when the next one may be there
                del running[session]

    def leave(request: gradio.Request) -> None:
        if (event := running.get(str(request.session_hash))) is not None:
            event.set()

    def stop(request: gradio.Request) -> Any:
        on = str(request.session_hash) in running
        leave(request)
        return STOPPED if on else gradio.skip()

    with gradio.Blocks(title="dit-accel", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gradio.Markdown("# dit-accel\nOne prompt and seed, dense and with methods.")
        with gradio.Row():
            with gradio.Column(min_width=280):
                prompt = gradio.Textbox(EXAMPLES[0], label="Prompt", lines=2, elem_id="prompt")
                gradio.Examples(EXAMPLES, prompt, label="Prompts that the embedded models know")
                preset = field("preset", gradio.Radio, choices=[*NAMES], value="balanced")
                with gradio.Accordion("Methods as TOML, beside the preset", open=False):
                    config = gradio.Textbox("", placeholder=TOML, lines=4, label="Methods", elem_id="methods")
            with gradio.Column(min_width=280):
                chosen = field("model", gradio.Dropdown, choices=list(models), value=model)
                steps = field("num_inference_steps", gradio.Slider, minimum=1, maximum=100, step=1, value=20)
                seed = field("seed", gradio.Number, precision=0, minimum=0)
        with gradio.Row():
            go = gradio.Button("Compare", variant="primary", elem_id="compare")
            halt = gradio.Button("Stop", elem_id="stop")
        outputs = _outputs(gradio)
        inputs = [prompt, config, preset, chosen, steps, seed]
        show = {"show_progress_on": outputs[0], "concurrency_limit": 1, "api_visibility": "private"}
        event = gradio.on([go.click, prompt.submit], compare, inputs, outputs, **show)
        halt.click(stop, None, outputs[0], cancels=[event], queue=False, api_visibility="private")
        page.unload(leave)
    return page


def field(name: str, kind: Callable[..., Any], **shown: Any) -> Any:
    """Make the field of an option with the help and the default that a request gives it."""
    text, default = help_and_default(name)
    label = name.removeprefix("num_").replace("_", " ").capitalize()
    return kind(**{"value": default, "label": label, "info": text, "elem_id": name, **shown})


def _outputs(gradio: Any) -> list[Any]:
    """Make the page's outputs: a text, three clips, in their places three pictures, and a report."""
    text = gradio.Markdown(FIRST, elem_id="told", min_height=72)
    clips, pictures = [], []
    with gradio.Row():
        for name in ("Dense", "With methods", "5 times the difference"):
            with gradio.Column(min_width=240):
                options = {"label": name, "interactive": False, "buttons": ["download"]}
                clips.append(gradio.Video(**options, autoplay=True, loop=True))
                pictures.append(gradio.Image(**options, visible=False))
    report = gradio.Textbox(label="Report", lines=6, interactive=False, elem_id="report")
    return [text, *clips, *pictures, report]


def _run(
    comparing: Callable[..., Any], progress: Any, stop: threading.Event, folder: Path, prompt: str,
    choices: dict[str, Any],
) -> Any:  # fmt: skip
    """Compare; or return why there is nothing to compare, as one plain sentence for the result's place."""
    from .side_by_side import Stopped, Watched

    def tell(what: str, done: int, total: int | None) -> None:
        progress((done, total) if total else 0, desc=what, unit="steps")

    try:
        return comparing(prompt, Path(tempfile.mkdtemp(dir=folder)), **choices, stages=Watched(tell, stop))
    except Stopped:
        return STOPPED
    except DitAccelError as error:
        text = str(error)
    except Exception as error:  # whatever a model or its files do; the page shows no traceback
        text = f"the run failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        print_error(text)
    return f"**Not made:** {html.escape(text, quote=False)}"


def _shown(gradio: Any, comparison: Any) -> list[Any]:
    """Return what the page's outputs become; the clips stay where there is but a sentence."""
    if isinstance(comparison, str):
        return [comparison, *[gradio.skip()] * 7]
    check, psnr = comparison.check, comparison.check.metrics.get("psnr")
    near = "" if psnr is None else f" · PSNR **{psnr:.1f} dB**"
    lines = [
        f"dense **{check.dense_seconds:.2f} s** · with methods **{check.accelerated_seconds:.2f} s** · "
        f"**{check.speedup:.2f} times** as fast, the whole call{near}",
        *(f"- {text}" for text in comparison.notes),
    ]
    files = [str(path) for path in (comparison.dense, comparison.accelerated, comparison.difference)]
    video = comparison.dense.suffix == ".mp4"
    clips = [gradio.update(value=path if video else None, visible=video) for path in files]
    pictures = [gradio.update(value=None if video else path, visible=not video) for path in files]
    return ["\n\n".join(lines), *clips, *pictures, comparison.report]


def _require_gradio() -> None:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        from gradio import __version__ as found  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MissingBackend(f"the page needs Gradio, which is not installed; {install('ui')}") from None
    if int(found.partition(".")[0]) < 6:  # takes less than the page gives
        raise MissingBackend(f"the page needs Gradio 6 or newer, found {found}; update it")


def _check_port(host: str, port: int) -> None:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind((host, port))
    except OSError as error:
        problem = f"nothing can listen at {host}, port {port} ({error.strerror or error})"
        raise ConfigError(f"{problem}; give another --port or --host") from None
