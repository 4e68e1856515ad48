"""What tiny pipelines are put together of: models, autoencoders, texts, pictures, stand-ins for encoders."""

import importlib
import inspect
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import diffusers
import torch
from PIL import Image
from tiny_models import MODELS
from torch import Tensor

Call = dict[str, Any]
SIZE = dict(height=128, width=160, num_inference_steps=3, output_type="latent")
VIDEO_SIZE = dict(height=64, width=128, num_frames=25, num_inference_steps=4, output_type="latent")
GUIDED = dict(VIDEO_SIZE, guidance_scale=3.0)
EULER = diffusers.FlowMatchEulerDiscreteScheduler
COLORS = ((90, 40, 10), (10, 40, 90), (60, 90, 30))


@dataclass
class Kit:
    """What a pipeline is assembled of.

    Attributes:
        parts: components and settings of the constructor; a class takes those that it names.
        call: arguments of a call; a class takes those that it names.
        setup: what is changed on the assembled pipeline, such as an encoder that stands in.
        pipe: the pipeline, where it is not assembled of parts.
    """

    parts: Call = field(default_factory=dict)
    call: Call = field(default_factory=dict)
    setup: Callable[[Any], None] | None = None
    pipe: Any = None

    def but(self, call: Mapping[str, Any] | None = None, **parts: Any) -> "Kit":
        """Return the kit with other parts and arguments of the call."""
        return replace(self, parts={**self.parts, **parts}, call={**self.call, **(call or {})})


@dataclass(frozen=True)
class Stock:
    """One pipeline class around a tiny transformer.

    Attributes:
        kit: makes what the pipeline is assembled of.
        call: further arguments of a call with one prompt.
        wrap: makes another class of the pipeline's.
        rows: (call, prompts) -> a call of several prompts, where that of the matrix does not do.
        off: the guidance scale at which this class guides no more.
        scale: the argument that says how far it guides, where that can't be seen from its negative prompt.
        repeated: arguments, such as a picture, that are given once for each prompt.
        one: it makes one video, whose rows are no prompts.
    """

    kit: Callable[[], Kit]
    call: Mapping[str, Any] = field(default_factory=dict)
    wrap: Callable[[type], type] = lambda cls: cls
    rows: Callable[[Call, Sequence[int]], Call] | None = None
    off: float = 1.0
    scale: str | None = None
    repeated: tuple[str, ...] = ()
    one: bool = False


def kit_of(
    size: Call, transformer: Any, vae: Any, call: Call, scheduler: Any = None, setup: Any = None, **parts: Any
) -> Kit:
    """A kit around a transformer and an autoencoder, with a flow scheduler unless another is given."""
    parts |= dict(transformer=transformer, vae=vae, scheduler=scheduler or EULER())
    return Kit(parts, {**size, **call}, setup)


def assemble(cls: type, kit: Kit) -> tuple[Any, Call]:
    """Return a pipeline and the arguments of its call; encoders and tokenizers that are not given are None."""
    asked = {
        name: one for name, one in inspect.signature(cls.__init__).parameters.items() if one.kind is not one.VAR_KEYWORD
    }
    needed = [name for name, value in asked.items() if value.default is value.empty and name != "self"]
    pipe: Any = cls(**{**dict.fromkeys(needed), **{name: part for name, part in kit.parts.items() if name in asked}})
    pipe.set_progress_bar_config(disable=True)
    if kit.setup is not None:
        kit.setup(pipe)
    taken = set().union(*(inspect.signature(one.__call__).parameters for one in cls.__mro__ if "__call__" in vars(one)))
    return pipe, {name: value for name, value in kit.call.items() if name in taken}


# Models


def build(cls: type | str, config: Mapping[str, Any], gates: float | None = 0.1, biases: bool = False) -> Any:
    """Build a model from a fixed seed; weights that are zero, which would hide what attention does, get values.

    Args:
        cls: the model's class, or its name in diffusers.
        config: its arguments.
        gates: the spread of the values; None: zeros stay.
        biases: whether vectors get values too.
    """
    torch.manual_seed(0)
    model: Any = (getattr(diffusers, cls) if isinstance(cls, str) else cls)(**config).eval()
    for parameter in model.parameters():
        if gates is not None and (biases or parameter.ndim > 1) and not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=gates)
    return model


def tiny(name: str, number: int = 0, *, gates: float | None = 0.1, biases: bool = False, **changes: Any) -> Any:
    """Build a transformer of the table of tiny models, with some of its config changed."""
    model = MODELS[name][number]
    return build(model.transformer, {**model.config, **changes}, gates, biases)


def tiny_video(name: str, number: int = 0, **changes: Any) -> Any:
    """The same with wider gates and biases, as the video pipelines are tested."""
    return tiny(name, number, gates=0.2, biases=True, **changes)


def part_of(name: str, adapter: str, **changes: Any) -> Any:
    """Build a model, such as a control network, with those of a tiny transformer's settings that it has."""
    known = inspect.signature(getattr(diffusers, name).__init__).parameters
    shared = {key: value for key, value in MODELS[adapter][0].config.items() if key in known}
    return build(name, {**shared, **changes})


SMALL = dict(latent_channels=4, block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2)


def vae(channels: int, cls: str = "AutoencoderKL", **options: Any) -> Any:
    """An autoencoder of pictures, 8 pixels a latent."""
    shift = dict(shift_factor=0.1) if cls == "AutoencoderKL" else {}
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    return build(cls, {**SMALL, **blocks, **shift, "latent_channels": channels, **options})


def wan_vae(channels: int, cls: str = "AutoencoderKLWan", **options: Any) -> Any:
    """An autoencoder of Wan's kind, which Qwen-Image has too."""
    scale = dict(latents_mean=[0.0] * channels, latents_std=[1.0] * channels)
    return build(cls, dict(base_dim=4, z_dim=channels, num_res_blocks=1, **scale) | dict(dim_mult=[1] * 4) | options)


def block_vae(cls: str, kind: str) -> Any:
    """An autoencoder of videos that names its blocks."""
    blocks = dict(down_block_types=(f"{kind}DownBlock3D",) * 4, up_block_types=(f"{kind}UpBlock3D",) * 4)
    return build(cls, {**SMALL, **blocks})


# Texts


def prompts(*shape: int, name: str = "prompt_embeds") -> Call:
    """Embeddings of a prompt and of a negative prompt, 6 tokens of 16 channels unless other sizes are given."""
    torch.manual_seed(1)
    return {f"{sign}{name}": torch.randn(1, *(shape or (6, 16))) for sign in ("", "negative_")}


def masks(
    name: str = "prompt_attention_mask", tokens: int = 6, dtype: torch.dtype = torch.bool, *, front: bool = False
) -> Call:
    """Masks of a prompt and of a shorter negative prompt, whose padding is at the end, or at the front as well."""
    mask = torch.arange(tokens)[None] < tokens - 1
    negative = mask.roll(1) & mask if front else torch.arange(tokens)[None] < tokens - 2
    return {name: mask.to(dtype), f"negative_{name}": negative.to(dtype)}


def masked(name: str = "prompt_attention_mask", dtype: torch.dtype = torch.bool) -> Call:
    """Embeddings and their masks."""
    return {**prompts(), **masks(name, dtype=dtype, front=True)}


def texts(said: str | list[str], *shape: int) -> Tensor:
    """Embeddings of some prompts, each drawn by what it says, [prompts, *shape]."""
    seeds = [zlib.crc32(one.encode()) for one in ([said] if isinstance(said, str) else said)]
    return torch.stack([drawn(*shape, seed=seed) for seed in seeds])


def letters(text: str) -> list[int]:
    """The tokens of a text, one a letter."""
    return [3 + ord(letter) % 17 for letter in text]


def connected(negative: bool = True) -> Call:
    """Embeddings behind the connectors of LTX-2."""
    values = {"connector_attention_mask": torch.ones(1, 6, dtype=torch.long)}
    for seed, name in enumerate(("connector_prompt_embeds", "connector_audio_prompt_embeds")):
        values[name] = drawn(1, 6, 16, seed=seed)
    return {**values, **({f"negative_{name}": value.flip(1) for name, value in values.items()} if negative else {})}


# Pictures


def drawn(*shape: int, seed: int) -> Tensor:
    """Normal numbers by a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def latents(*size: int) -> Tensor:
    """A picture as the encoder of a modular pipeline's blocks gives it."""
    return drawn(1, *size, seed=6)


def picture(height: int = 128, width: int = 160) -> Tensor:
    """A picture of noise."""
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(2))


def pil(height: int, width: int, mode: str = "RGB") -> Any:
    """The same as a picture of PIL's."""
    noise = picture(height, width)[0].movedim(0, -1)
    return Image.fromarray((noise * 255).byte().contiguous().numpy()).convert(mode)


def mask(height: int = 128, width: int = 160) -> Tensor:
    """The right half of a picture is to be made anew."""
    return (torch.arange(width)[None, None, None] > width // 2).float().expand(1, 1, height, width)


def drawing(height: int = 64, width: int = 64, color: tuple[int, int, int] = COLORS[0]) -> Image.Image:
    """A picture of one color, with a square of another in it."""
    made = Image.new("RGB", (width, height), color)
    made.paste((200, 180, 20), (width // 4, height // 4, width // 2, height // 2))
    return made


def clip(frames: int = 17, height: int = 64, width: int = 64) -> list[Image.Image]:
    """Frames that differ."""
    return [drawing(height, width, COLORS[index % len(COLORS)]) for index in range(frames)]


EDITED = dict(image=picture(), strength=1.0)
INPAINTED = dict(EDITED, mask_image=mask())


def small_references(size: tuple[Any, ...]) -> Callable[[type], type]:
    """Return what makes a pipeline class scale reference images to ``size``, not to a million pixels."""

    def wrapped(cls: type) -> type:
        class Small(cls):
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                with mock.patch.object(sys.modules[cls.__module__], "calculate_dimensions", return_value=size):
                    return super().__call__(*args, **kwargs)

        return Small

    return wrapped


# Stand-ins


class Processor:
    """Stands in for a vision-language processor where a pipeline asks one for its template's length."""

    tokenizer: Any = SimpleNamespace(encode=lambda text: [0])
    image_processor = None

    def apply_chat_template(self, *_: Any, **__: Any) -> list[list[int]]:
        return [[]]


class Letters:
    """Stands in for Cosmos 3's tokenizer: a token is a letter."""

    eos_token_id = 1

    def convert_tokens_to_ids(self, token: str) -> int:
        return 2

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:
        return SimpleNamespace(input_ids=letters(conversation[-1]["content"]))


class Unguarded:
    """Stands in for Cosmos' guard models, without which its pipelines refuse to run; its prompts are noise."""

    def to(self, device: Any) -> "Unguarded":
        return self

    def check_video_safety(self, frames: Any) -> Any:
        return frames


class Conditioner(torch.nn.Module):
    """Stands in for a text conditioner: it hands on what it gets."""

    dtype, device = torch.float32, torch.device("cpu")

    def forward(self, source_hidden_states: Tensor, **_: Any) -> Tensor:
        return source_hidden_states


def answering(name: str, answer: Callable[..., Any]) -> Callable[[Any], None]:
    """Return a setup that lets something stand in for a pipeline's method."""
    return lambda pipe: setattr(pipe, name, answer)


# Modular pipelines


def blocks_of(cls: Any) -> Any:
    """Return the blocks that a modular pipeline runs unless others are given."""
    package = importlib.import_module(cls.__module__.rsplit(".", 1)[0])
    return getattr(package, cls.default_blocks_name)()
