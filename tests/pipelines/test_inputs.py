"""The files that a run starts from: which argument each is for, on tiny pipelines of diffusers' own classes."""

import functools
import inspect
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from dit_accel_pipelines.generation import inputs
from dit_accel_pipelines.generation.generate import run
from dit_accel_pipelines.generation.media import write_media
from dit_accel_pipelines.generation.pipeline_call import PICTURES, CallSignature
from dit_accel_pipelines.generation.request import Request, resolve
from dit_accel_pipelines.generation.resume import request_digest
from model_folders import model_folder
from PIL import Image
from tiny_stock import PIPELINES, stock_pipeline

from dit_accel.errors import ConfigError

COLORS = ("red", "blue", "lime", "black")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures of 160 x 128 pixels, a mask, and videos of so many frames as their names say."""
    folder = tmp_path_factory.mktemp("files")
    for place, name in enumerate("abcm"):
        drawn = Image.new("RGB", (160, 128), COLORS[place])
        drawn.paste("white", (20 + 10 * place, 30, 80 + 20 * place, 100))
        drawn.save(folder / f"{name}.png")
    for name in ("17", "17x", "18", "21", "21x"):
        frames = np.zeros((int(name[:2]), 64, 64, 3), np.uint8)
        for time in range(len(frames)):
            frames[time, :, time : time + 20, len(name) - 2] = 255
        write_media(folder / f"{name}.gif", frames, fps=8)
    return folder


def request(folder: Path, **changes: Any) -> Request:
    """Return a request in whose file names ``@`` is the folder."""
    for option in PICTURES:
        changes[option] = [text.replace("@", f"{folder}/") for text in changes.get(option, ())]
    values: dict[str, Any] = {"prompt": "a kite", "output": folder / "out.png"}
    return Request(**{**values, **changes})


class Silent:
    """Stands in for what makes sound of LTX-2's spectrum."""

    config = SimpleNamespace(output_sampling_rate=800)

    def __call__(self, mel: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(mel), 1, 8)


def with_embeddings(pipe: Any, call: dict[str, Any]) -> Any:
    """Return a tiny pipeline, which has no text encoder, that takes its prompt from a call's embeddings."""
    cls = next(kind for kind in type(pipe).__mro__ if kind.__module__.startswith("diffusers"))

    @functools.wraps(cls.__call__)
    def called(self: Any, **arguments: Any) -> Any:
        arguments.pop("prompt")
        return type(self).__mro__[1].__call__(self, **{**call, **arguments})

    pipe.__class__ = type(cls.__name__, (type(pipe),), {"__call__": called})
    return pipe


def frames(name: str, folder: Path, options: dict[str, Any]) -> np.ndarray:
    pipe, call = stock_pipeline(name)
    if getattr(pipe, "vocoder", 0) is None:
        pipe.vocoder = Silent()
    left_out = {"output_type", "generator", *PICTURES["image"], *PICTURES["video"], *options}
    call = {key: value for key, value in call.items() if key not in left_out}
    return run(with_embeddings(pipe, call), request(folder, **options)).frames


FIRST_AND_LAST = dict(image=["first=@a.png", "last=@b.png"])
INPAINTED = dict(image=["@a.png", "mask=@m.png"], strength=0.5)
RUNS: list[tuple[str, dict[str, Any]]] = [
    ("WanImageToVideoPipeline, first and last frame", FIRST_AND_LAST),
    ("WanVACEPipeline", dict(video=["@17.gif", "mask=@17.gif"], image=["reference=@a.png", "@b.png"], num_frames=17)),
    ("WanVACEPipeline", dict(video=["@17.gif"], image=["mask=@m.png", "@b.png"], num_frames=17)),
    ("WanVideoToVideoPipeline", dict(video=["@17.gif"], strength=0.5)),
    ("LucyEditPipeline", dict(video=["@17.gif"], num_frames=17)),
    ("CogVideoXFunControlPipeline", dict(video=["@17.gif"])),
    ("SkyReelsV2ImageToVideoPipeline", FIRST_AND_LAST),
    ("LTXConditionPipeline", dict(image=["first=@a.png", "8=@c.png", "last=@b.png"], strength=0.9)),
    ("LTX2ConditionPipeline", FIRST_AND_LAST),
    ("LTX2HDRPipeline", dict(video=["reference=@17.gif"])),
    ("FluxKontextPipeline", dict(image=["@a.png", "@b.png"])),
    ("FluxImg2ImgPipeline", dict(image=["@b.png"], strength=0.5)),
    ("FluxInpaintPipeline", INPAINTED),
    ("FluxFillPipeline", INPAINTED),
    ("FluxControlPipeline", dict(image=["@b.png"])),
    ("FluxControlImg2ImgPipeline", dict(image=["@a.png", "control=@b.png"])),
    ("Flux2Pipeline", dict(image=["@a.png", "reference=@b.png"])),
    ("QwenImageEditPipeline", dict(image=["@b.png"])),
    ("QwenImageEditPlusPipeline", dict(image=["@a.png", "@b.png"])),
    ("JoyImageEditPlusPipeline", dict(image=["@a.png", "@b.png"])),
    ("StableDiffusion3InpaintPipeline", INPAINTED),
    ("WanAnimatePipeline", dict(image=["@a.png"], video=["pose=@21.gif", "face=@21.gif"])),
    ("HunyuanVideoFramepackPipeline", FIRST_AND_LAST),
]
LAST = len(RUNS) - 2
"""From here on they take longer."""


@pytest.mark.parametrize(
    ("name", "options"), [*RUNS[:LAST], *(pytest.param(*run, marks=pytest.mark.slow) for run in RUNS[LAST:])]
)
def test_every_file_reaches_the_model(name: str, options: dict[str, Any], folder: Path):
    """Another picture or video in any place makes another output."""
    made = frames(name, folder, options)
    last = "video" if "video" in options and len(options.get("image", ())) < 2 else "image"
    *before, text = options[last]
    other = text.replace("b.png", "c.png").replace("m.png", "a.png").replace(".gif", "x.gif")
    assert made.ndim == 4
    assert not np.array_equal(made, frames(name, folder, {**options, last: [*before, other]}))


LEFT_OUT = {"ip_adapter_image", "negative_ip_adapter_image", "masked_image_latents", "text_images"}
"""Pictures for which generate has no option."""


def test_all_pictures_that_pipelines_take_have_an_option():
    known = {*LEFT_OUT, *PICTURES["image"], *PICTURES["video"]}
    for cls in filter(None, {getattr(diffusers, name.split(",")[0], None) for name in PIPELINES}):
        parameters = inspect.signature(cls.__call__).parameters.values()
        pictures = {one.name for one in parameters if re.search("Image(Input|.Image)", str(one.annotation))}
        assert pictures <= known, (cls.__name__, pictures - known)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("FluxPipeline", dict(video=["@17.gif"]), r"FluxPipeline takes no video, got .*17\.gif"),
    ("WanImageToVideoPipeline", dict(image=["last=@b.png"]), r"last=.*b\.png .* got no image; add --image FILE"),
    ("WanVACEPipeline", dict(image=["mask=@m.png"]), r"mask=.*m\.png .* got no video; add --video FILE"),
    ("LTX2ConditionPipeline", dict(image=["mask=@m.png"]), r"it takes --image \[first\|last\|NUMBER=\]FILE, --video"),
    ("WanImageToVideoPipeline", dict(image=["@a.png", "@b.png"]), r"one image, got 2: .*a\.png, .*b\.png"),
    ("WanImageToVideoPipeline", dict(image=["@a.png", "mask=@m.png"]), r"'mask', got .* --image last=FILE"),
    ("WanImageToVideoPipeline", dict(image=["8=@a.png"]), r"no image '8', got 8=.*a\.png"),
    ("FluxInpaintPipeline", dict(image=["@a.png", "mask=@m.png", "mask=@b.png"]), "one mask_image, got 2"),
    ("EasyAnimateInpaintPipeline", dict(video=["@17.gif"]), r"takes no video, got .*17\.gif"),
    ("FluxPipeline", dict(arg=["max_sequence_lenght=8"]), r"'max_sequence_lenght'; did you mean 'max_sequence_length'"),
    ("FluxPipeline", dict(arg=["height=8"]), r"arg height .*'height=8'; use --height"),
    ("FluxFillPipeline", dict(arg=["mask-image=m.png"]), r"arg mask_image .*use --image NAME=FILE"),
    ("FluxPipeline", dict(arg=["max_sequence_length=long"]), r"is 512 by default, got 'long'"),
    ("FluxPipeline", dict(arg=["latents=1"]), r"arg latents .*'latents=1'"),
    ("FluxPipeline", dict(arg=["sigmas"]), r"NAME=VALUE, got 'sigmas'"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_what_a_pipeline_does_not_take_is_refused(name: str, options: dict[str, Any], message: str, folder: Path):
    asked, call = request(folder, **options), CallSignature.of(getattr(diffusers, name))
    with pytest.raises(ConfigError, match=message):
        call.check(asked.full_call(call, inputs.arguments_of(inputs.inputs_of(asked), call)))


def test_names_and_files_are_told_apart(folder: Path, tmp_path: Path, monkeypatch):
    """A file whose name has an equals sign is a file; a single path stands for a list of one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.png").touch()
    asked = Request(prompt="a kite", output=tmp_path / "o.png", image=["a=b.png", "last=b.png", "./c=d.png"])
    files = [(file.name, str(file.path)) for file in inputs.inputs_of(asked)]
    assert files == [(None, "a=b.png"), ("last", "b.png"), (None, "c=d.png")]
    assert str(inputs.inputs_of(replace(asked, image="x.png"))[0]) == "x.png"


def test_arguments_of_the_call_reach_it_as_toml_reads_them():
    call = CallSignature.of(diffusers.FluxPipeline)
    texts = ["max-sequence-length=64", "sigmas=[1.0, 0.5]", "prompt_2=a kite"]
    assert call.free_arguments(texts) == {"max_sequence_length": 64, "sigmas": [1.0, 0.5], "prompt_2": "a kite"}


WIDE, TALL = (160, 80), (80, 160)


@pytest.mark.parametrize(
    ("size", "options", "made", "note"),
    [
        (WIDE, {}, (48, 96), r"96 x 48 pixels, in the shape of .*p\.png"),
        (TALL, {}, (96, 48), r"48 x 96 pixels"),
        ((64, 64), {}, (64, 64), None),
        (WIDE, dict(height=64, width=128), (64, 128), None),
        (WIDE, dict(height=64), (64, 64), r"160 x 80 pixels, the output 64 x 64"),
    ],
)
def test_the_output_takes_the_shape_of_the_picture(size, options, made, note, tmp_path: Path):
    model = str(model_folder(tmp_path / "m", _class_name="WanImageToVideoPipeline", expand_timesteps=True))
    Image.new("RGB", size).save(tmp_path / "p.png")
    asked, _, notes, _ = resolve(request(tmp_path, model=model, image=["@p.png"], **options))
    assert (asked.height, asked.width) == made
    assert [bool(re.search(note, text)) for text in notes] == [True] if note else notes == []
    with pytest.raises(ConfigError, match=r"first image .*last=.*p\.png"):
        resolve(request(tmp_path, model=model, image=["@p.png", "last=@p.png"]))


def test_a_video_that_is_followed_gives_the_length(folder: Path, tmp_path: Path):
    model = str(model_folder(tmp_path / "m", _class_name="WanVACEPipeline"))
    asked, _, notes, _ = resolve(request(folder, model=model, video=["@18.gif"], image=["mask=@m.png"]))
    assert (asked.num_frames, len(notes)) == (17, 1)
    read = inputs.read_pictures(asked, CallSignature.of(diffusers.WanVACEPipeline))
    assert (len(read["video"]), len(read["mask"]), read["mask"][0].mode) == (17, 17, "L")
    for options, message in (
        (dict(video=["@18.gif"], num_frames=21), r"num_frames 21 .*18\.gif .*18"),
        (dict(video=["@17.gif", "mask=@18.gif"]), r"17\.gif 17, mask=.*18"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve(request(folder, model=model, **options))


def test_a_frame_beyond_the_output_and_pictures_side_by_side(folder: Path):
    call = CallSignature.of(diffusers.LTXConditionPipeline)
    held = inputs.read_pictures(request(folder, image=["last=@a.png", "8=@b.png"], num_frames=17, strength=0.5), call)
    assert [(one.frame_index, one.strength) for one in held["conditions"]] == [(16, 0.5), (8, 0.5)]
    with pytest.raises(ConfigError, match=r"17=.*a\.png .* 0 to 16"):
        inputs.read_pictures(request(folder, image=["17=@a.png"], num_frames=17), call)
    wide = inputs.side_by_side([Image.new("RGB", (40, 20), "red"), Image.new("RGB", (20, 40), "blue")])
    assert (wide.size, wide.getpixel((39, 0)), wide.getpixel((40, 19))) == ((50, 20), (255, 0, 0), (0, 0, 255))


def test_the_digest_of_a_request_is_of_what_its_files_hold(folder: Path, tmp_path: Path):
    """And of what each is for, not of where it lies."""
    copy = tmp_path / "copy.png"
    copy.write_bytes((folder / "a.png").read_bytes())
    asked = request(folder, image=["@a.png"])
    assert request_digest(replace(asked, image=[str(copy)])) == request_digest(asked)
    others = [
        dict(image=["last=@a.png"]),
        dict(image=["@b.png"]),
        dict(video=["@a.png"], image=[]),
        dict(arg=["x=1"]),
        dict(strength=0.5),
        dict(flow_shift=2.0),
        dict(true_cfg_scale=2.0),
        dict(attention_backend="native"),
    ]
    digests = [request_digest(request(folder, **{"image": ["@a.png"], **changes})) for changes in others]
    assert len({*digests, request_digest(asked)}) == 1 + len(others)
