"""The networks that VBench and its like ask: each by the official weights, on one device, loaded when first asked."""

import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel import ConfigError

from .. import official, sampling, weight_files
from ..sampling import Frames
from . import bert, clip, grit, inception, ported, tag2text, vit

TOGETHER = 32
"""Frames that go through a network of features at once."""

CONTEXT, SHORT = 77, 32
"""Tokens of a text that CLIP and ViCLIP read."""

RAFT_ROUNDS = 20

I3D_LEAST = 10
"""Frames of the shortest clip of which I3D gives something."""

LEAST = 128
"""Pixels of the padded short side from which RAFT and AMT give numbers: their coarsest level has 2 cells then."""


class Networks:
    """The networks of one folder of weights, laid out as `weight_files` has it.

    A file that is another than its publisher's, or that lacks a weight, raises a `ConfigError` when it is first needed.

    Args:
        folder: of the weights.
        device: on which they run.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.folder, self.device = folder, device
        self._read: dict[str, dict[str, Tensor]] = {}
        self._networks: dict[str, Any] = {}

    def missing(self, names: tuple[str, ...]) -> str | None:
        """Return why networks can't be had, None if they can; files, libraries and official code alike."""
        reasons = [weight_files.absent(name, self.folder) for name in names]
        if {"raft", "amt", "umt", "tag2text"} & set(names):
            reasons.append(official.missing())
        modules = {module: package for name in names for module, package in LIBRARIES.get(name, {}).items()}
        reasons += [_no_library(*one) for one in modules.items()]
        found = [reason for reason in reasons if reason is not None]
        return "; ".join(found) or None

    def hashes(self, names: tuple[str, ...]) -> dict[str, str]:
        """Return the SHA-256 of the files of networks."""
        return {name: weight_files.hash_of(name, self.folder) for name in names}

    def _weights(self, name: str) -> dict[str, Tensor]:
        if name not in self._read:
            held = weight_files.read(name, self.folder)
            self._read[name] = {key: value.to(self.device) for key, value in held.items()}
        return self._read[name]

    def _ask(self, name: str, frames: Tensor, function: Callable[[Tensor, Mapping[str, Tensor]], Tensor]) -> Tensor:
        """Return what a function of frames and weights gives, batch by batch."""
        with self._complete(name) as weights:
            return torch.cat([function(part.to(self.device), weights).cpu() for part in frames.split(TOGETHER)])

    @contextmanager
    def _complete(self, name: str) -> Iterator[Mapping[str, Tensor]]:
        """Give a network's weights for inference; what they lack is named."""
        weights = self._weights(name)
        with self._whole(name), torch.inference_mode():
            yield weights

    @contextmanager
    def _whole(self, name: str) -> Iterator[None]:
        """Name what a file of weights lacks, or has too much or in another size."""
        try:
            yield
        except KeyError as error:
            raise ConfigError(
                f"{self._path(name)} lacks {error}, so it holds another network's weights; download it again"
            ) from None
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ConfigError(f"{self._path(name)} holds another network's weights: {reason}") from None

    def _path(self, name: str, *, checked: bool = False) -> Path:
        """Return where a file lies; with its hash checked, if so wanted."""
        if checked:
            weight_files.hash_of(name, self.folder)
        return self.folder / weight_files.WEIGHT_FILES[name].path

    def _tower(self, name: str, make: Callable[..., Any], *options: Any) -> Any:
        """Return a network of `ported`, made once of the weights of a file."""
        if name not in self._networks:
            self._networks[name] = make(self._weights(name), *options)
        return self._networks[name]

    def _made(self, name: str, make: Callable[[Mapping[str, Tensor]], Any]) -> Any:
        """Return a network made once of the weights of a file; one that holds another network's is refused."""
        if name not in self._networks:
            with self._whole(name):
                self._networks[name] = make(weight_files.read(name, self.folder)).to(self.device).eval()
        return self._networks[name]

    def _each(self, given: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what a network gives of frames or tokens, batch by batch."""
        with torch.inference_mode():
            return torch.cat([function(part.to(self.device)).cpu() for part in given.split(TOGETHER)])

    def dino(self, frames: Tensor, name: str = "dino") -> Tensor:
        """Return DINO's features [F, D] of unit length, of frames as `sampling.for_dino` gives them."""
        return F.normalize(self._each(frames, partial(vit.dino, self._made(name, vit.tower))), dim=1)

    def dinov2(self, frames: Tensor) -> Tensor:
        """Return DINOv2's features [F, D] of unit length, of frames as `sampling.for_dinov2` gives them."""
        return self.dino(frames, "dinov2")

    def clip(self, name: str, frames: Tensor) -> Tensor:
        """Return CLIP's embeddings [F, D] of unit length, of frames as `sampling.for_clip` gives them."""
        return F.normalize(self._each(frames, self._made(name, clip.openai).encode_image), dim=1)

    def clip_words(self, name: str, text: str) -> Tensor:
        """Return CLIP's embedding [1, D] of unit length of a text, of which more than 77 tokens are refused."""
        tokens = clip.tokens(text, CONTEXT, cut=False)
        return F.normalize(self._each(tokens, self._made(name, clip.openai).encode_text), dim=1)

    def viclip(self, frames: Tensor) -> Tensor:
        """Return ViCLIP's embedding [1, D] of unit length of 8 frames."""
        return F.normalize(self._each(frames, partial(clip.clip_video, self._made("viclip", clip.viclip))), dim=1)

    def viclip_words(self, text: str) -> Tensor:
        """Return ViCLIP's embedding [1, D] of unit length of a text, of which it reads 32 tokens."""
        network = self._made("viclip", clip.viclip)
        tokens = clip.tokens(text, SHORT, places=network.context_length)
        return F.normalize(self._each(tokens, network.encode_text), dim=1)

    def aesthetic(self, embeddings: Tensor) -> Tensor:
        """Return LAION's score, about 0 to 10, of CLIP L/14's embeddings [F, D] of unit length: [F]."""
        return self._ask("aesthetic", embeddings, lambda x, held: F.linear(x, held["weight"], held["bias"]))[:, 0]

    def umt(self, frames: Tensor) -> Tensor:
        """Return the logits [classes] of the actions of Kinetics-400, of 16 frames."""
        return self._each(frames, partial(vit.umt, self._made("umt", vit.tower)))

    @cached_property
    def _words(self) -> list[str]:
        return bert.read_words(self._path("bert-words", checked=True))

    def scenes(self, frames: Tensor) -> list[str]:
        """Return Tag2Text's captions of a video's frames, as `sampling.for_tag2text` gives them.

        They are those of the first third of the frames, three times each; see `tag2text.looked_at`.
        """
        places = tag2text.looked_at(len(frames))
        seen = frames[: places[-1] + 1].to(self.device)
        with self._complete("tag2text") as weights:
            features = tag2text.features(seen, self._tower("tag2text", ported.swin, "visual_encoder."))
            message = tag2text.captions(features, weights, self._words, official.tags())
        return [message[place] for place in places]

    def detections(self, frames: Tensor) -> list[list[tuple[str, list[int]]]]:
        """Return the names and boxes of what GRiT finds in each frame, as `sampling.for_grit` gives them."""
        found = []
        with self._complete("grit") as weights:
            for seen in self._things(frames, weights):
                names = self._said(grit.texts(seen.features, grit.NAME, weights))
                found.append(list(zip(names, seen.boxes.int().tolist(), strict=True)))
        return found

    def sentences(self, frames: Tensor) -> list[list[tuple[str, str]]]:
        """Return GRiT's sentences about each frame's things, each with the name of the frame's surest thing."""
        found = []
        with self._complete("grit") as weights:
            for seen in self._things(frames, weights):
                names = self._said(grit.texts(seen.features[:1], grit.NAME, weights))
                found.append([(one, names[0]) for one in self._said(grit.texts(seen.features, grit.SENTENCE, weights))])
        return found

    def _things(self, frames: Tensor, weights: Mapping[str, Tensor]) -> Iterator[grit.Things]:
        tower = self._tower("grit", ported.vitdet, vit.HEAD)
        return (grit.things(frame.to(self.device), weights, tower) for frame in frames)

    def _said(self, tokens: Tensor) -> list[str]:
        return [bert.text(one, self._words) for one in tokens.tolist()]

    def inception(self, frames: Frames) -> Tensor:
        """Return Inception's features [F, 2048] of uint8 frames, by which FID is measured."""
        given = sampling.tensor(frames) / 255
        return self._each(given, partial(inception.inception, self._made("inception", inception.network)))

    @cached_property
    def _i3d(self) -> Any:
        path = self._path("i3d", checked=True)
        try:
            with _quiet():
                return torch.jit.load(path, map_location=self.device).eval()
        except RuntimeError as error:
            raise ConfigError(
                f"{path} can't be read as TorchScript ({str(error).splitlines()[0]}); download it again"
            ) from None

    def i3d(self, frames: Frames) -> Tensor:
        """Return I3D's 400 logits [1, 400] of a clip of 10 or more uint8 frames, by which FVD is measured."""
        if len(frames) < I3D_LEAST:
            raise ConfigError(f"I3D takes {I3D_LEAST} frames and more, and there are {len(frames)}")
        sized = sampling.resized(sampling.tensor(frames) / 127.5 - 1, (sampling.SIDE, sampling.SIDE), "bilinear")
        clip = sized.transpose(0, 1)[None].to(self.device)
        with torch.inference_mode():
            return self._i3d(clip, rescale=False, resize=False, return_features=True).reshape(1, -1).cpu()

    def pickscore(self, frames: Frames, text: str) -> float:
        """Return PickScore of uint8 frames and a prompt, of which 77 tokens are read: the mean over frames."""
        scale = float(self._made("pickscore", clip.huge).logit_scale.detach().exp())
        return scale * self._preferred("pickscore", sampling.for_pickscore(frames), text)

    def hpsv2(self, frames: Frames, text: str) -> float:
        """Return HPSv2.1 of uint8 frames and a prompt, of which 77 tokens are read: the mean over frames."""
        return self._preferred("hpsv2", sampling.for_hps(frames), text)

    def _preferred(self, name: str, given: Tensor, text: str) -> float:
        tokens = clip.tokens(text, CONTEXT).to(self.device)
        network = self._made(name, clip.huge)
        return float(self._each(given, lambda part: clip.cosines(network, part, tokens)).mean())

    @cached_property
    def _raft(self) -> Any:
        options = _Options(small=False, mixed_precision=False, alternate_corr=False)
        network = official.module("RAFT.core.raft").RAFT(options)
        return self._filled("raft", network)

    def raft(self, one: Tensor, two: Tensor) -> Tensor:
        """Return the flow [2, height, width] in pixels between frames [3, height, width] in 0..255, padded to eighths.

        The padding stays on, as in the official code, whose strongest vectors are chosen with it. Frames so small that
        RAFT's coarsest level is one cell, of which it makes nan, are refused.
        """
        pair = [_large("RAFT", _padded(frame[None].to(self.device), 8)[0]) for frame in (one, two)]
        with torch.inference_mode(), _quiet():
            return self._raft(*pair, iters=RAFT_ROUNDS, test_mode=True)[1][0].cpu()

    @cached_property
    def _amt(self) -> Any:
        network = official.module("amt.networks.AMT-S").Model(corr_radius=3, corr_lvls=4, num_flows=3)
        return self._filled("amt", network)

    def amt(self, one: Tensor, two: Tensor) -> Tensor:
        """Return the frame [3, height, width] in the middle of two in [0, 1]; small ones are refused, as of RAFT."""
        (first, (left, top)), (second, _) = (_padded(frame[None].to(self.device), 16) for frame in (one, two))
        _large("AMT", first)
        half = first.new_full((1, 1, 1, 1), 0.5)
        with torch.inference_mode():
            drawn = self._amt(first, second, half, scale_factor=1.0, eval=True)["imgt_pred"][0]
        return drawn[:, top : top + one.shape[1], left : left + one.shape[2]].cpu()

    @cached_property
    def _musiq(self) -> Any:
        from importlib import import_module

        path = str(self._path("musiq", checked=True))
        network = import_module("pyiqa.archs.musiq_arch").MUSIQ(pretrained_model_path=path)
        return network.to(self.device).eval()

    def musiq(self, frames: Tensor) -> Tensor:
        """Return MUSIQ's scores, 0 to 100, of frames [F, 3, height, width] in [0, 1], one by one: [F]."""
        with torch.inference_mode():
            return torch.stack([self._musiq(frame[None].to(self.device)).reshape(()).cpu() for frame in frames])

    def _filled(self, name: str, network: Any) -> Any:
        with self._whole(name):
            network.load_state_dict(self._weights(name))
        return network.to(self.device).eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the official code's notes on names that torch has renamed to itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Options(types.SimpleNamespace):
    """RAFT's options, which it asks for by ``in`` as well."""

    def __contains__(self, name: object) -> bool:
        return name in vars(self)


_CLIP = {"open_clip": "open-clip-torch"}
LIBRARIES = {
    "musiq": {"pyiqa": "pyiqa"}, "raft": {"scipy": "scipy"}, "umt": {"cv2": "opencv-python-headless", "timm": "timm"},
    **dict.fromkeys(("clip-b32", "clip-l14", "viclip", "hpsv2", "pickscore"), _CLIP),
    "dino": {"timm": "timm"}, "dinov2": {"timm": "timm"},
    "grit": {"torchvision": "torchvision"}, "inception": {"torchvision": "torchvision"},
}  # fmt: skip
"""Network -> the modules that it takes, and their packages."""


def _no_library(module: str, package: str) -> str | None:
    from importlib.util import find_spec

    return None if find_spec(module) is not None else f"{package} is not installed; pip install {package}"


def _large(name: str, frames: Tensor) -> Tensor:
    """Return padded frames as given; those that are too small are refused."""
    if min(frames.shape[2:]) < LEAST:
        raise ConfigError(f"{name} takes frames of {LEAST} pixels and more, padded these have {min(frames.shape[2:])}")
    return frames


def _padded(frames: Tensor, multiple: int) -> tuple[Tensor, tuple[int, int]]:
    """Return frames with edges repeated up to a multiple, shared out evenly, and how much lies left and above."""
    down, right = (-length % multiple for length in frames.shape[2:])
    left, top = right // 2, down // 2
    return F.pad(frames, (left, right - left, top, down - top), mode="replicate"), (left, top)
