"""Adapters: what the core must know of a model family, as data; nothing that adapter files import loads torch."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import ConfigError
from .blocks import BlockList
from .cross_attention import CrossAttention
from .guidance import Guidance
from .joined_text import JoinedText
from .noise import Noise
from .rotary import Rope
from .sizes import Sizes, patch_sizes, read_sizes

ONE_FRAME = "an image is one frame, of which the mask keeps everything"
"""Why a method that thins out over frames is refused for image models: it is degenerate, not wrong."""

_NO_LONGER = "an image has no frames of which there could be more than the model was trained on"

IMAGE_REFUSED: Mapping[str, str] = {
    "dfa": "an image does not move, which is how the foreground is recognised",
    "radial": ONE_FRAME,
    "lvsa": _NO_LONGER,
    "ultravico": _NO_LONGER,
}
"""Method name -> why it makes no sense on a model that makes single images: every such adapter refuses these."""

Grid = tuple[int, int, int, int, int]
"""(frames, height, width) of the patch grid, then text tokens before and after the visual ones."""

NO_STEP: Grid = (0, 0, 0, 0, 0)
"""The grid of a forward that is not a denoising step, such as one that fills a cache: it stays dense."""


def latents_grid(
    config: Any,
    inputs: Mapping[str, Any],
    *,
    frames_axis: int | None = 2,
    channels_last: bool = False,
    text: Literal["none", "before", "after"] = "none",
    joined: Sequence[str] = ("encoder_hidden_states",),
    reference_frames: int = 0,
) -> Grid:
    """Read the grid off latents [..., H, W], the config's patch size and the text's length.

    Args:
        config: has ``patch_size`` (t, h, w) or one number, then with or without ``patch_size_t``.
        frames_axis: where the latents count their frames: 2 in [B, C, T, H, W]; None for an image.
        channels_last: the latents are [..., H, W, C].
        text: where text joins the sequence; ``none`` for cross-attention.
        joined: the inputs [B, tokens, C] that join the sequence as text; one that is not given counts 0.
        reference_frames: first frames of the latents that are not video; they count as text before it.
    """
    if text not in ("none", "before", "after"):
        raise ConfigError(f"latents_grid takes text='none', 'before' or 'after', got text={text!r}; use one of them")
    shape = inputs["hidden_states"].shape[:-1] if channels_last else inputs["hidden_states"].shape
    patch_frames, patch_height, patch_width = patch_sizes(config.patch_size, getattr(config, "patch_size_t", None))
    frames = 1 if frames_axis is None else shape[frames_axis] // patch_frames
    height, width = shape[-2] // patch_height, shape[-1] // patch_width
    inputs_in_sequence = [] if text == "none" else [inputs[name] for name in joined if inputs.get(name) is not None]
    tokens = sum(value.shape[1] for value in inputs_in_sequence)
    before, after = (tokens, 0) if text == "before" else (0, tokens)
    return frames - reference_frames, height, width, before + reference_frames * height * width, after


def patch_count(latents: Any, patch: Sequence[int]) -> int:
    """Return the tokens of further latents [B, C, T, H, W], such as a history: 0 for None.

    Args:
        latents: the tensor, padded by the model to whole patches where it has to be.
        patch: (t, h, w) that one token covers.
    """
    if latents is None:
        return 0
    return math.prod(-(-size // part) for size, part in zip(latents.shape[2:], patch, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Sizes of one released model, so that a plan needs neither weights nor a network.

    Attributes:
        name: what users type, such as ``wan2.1-14b``.
        repo: the model's hub id.
        layers: transformer blocks that hold a self-attention.
        heads: attention heads, H.
        head_dim: channels of a head, D.
        ffn_dim: hidden width of the feed-forward.
        patch: (t, h, w) latents a token covers.
        vae: (t, s): pixels a latent covers in time (except for the first frame) and in each spatial direction.
        size_multiple: what the pipeline asks height and width to be multiples of, in pixels, whatever the patches need.
        text_tokens: text tokens inside the self-attention sequence (joint attention); 0 for cross-attention models.
        cross_tokens: text (and image) tokens of the cross-attention; 0 where there is none.
        height: default output height in pixels.
        width: default output width in pixels.
        num_frames: default number of frames.
        num_inference_steps: default number of denoising steps.
        forwards_per_step: transformer rows per step, 2 with classifier-free guidance.
        experts: transformers that share the steps, 2 for Wan 2.2 A14B.
        first_expert: share of a run's steps that the first of two transformers makes; None: not known.
        in_channels: channels of the transformer's input, where that tells it from a model of the same sizes, such as 36
            for image to video; None: any.
        trained_frames: frames of its training clips, as the transformer's tokens count them; None: not known, or
            several lengths, or an image model.
        trained_size: rows and columns of tokens of the largest pictures that it was trained on; None: not known.
        not_advised: methods for larger outputs that are published not to help on it; no advice names them.
        beyond: what ``generate`` does for pictures larger than trained: ``tiled_vae``, ``pinned_shift``.
        config: entries of its transformer's config by which its rotary positions differ from those of the adapter's
            other models or from the class's defaults, and what `Rope.axes` asks for; empty: they don't differ.
        recipes: method name -> option -> value: what the papers and their code use on this model.
        head_sets: name -> heads such as ``L3H1``: published sets for methods that perturb some heads.
    """

    name: str
    repo: str
    layers: int
    heads: int
    head_dim: int
    ffn_dim: int
    patch: tuple[int, int, int]
    vae: tuple[int, int]
    size_multiple: int = 1
    text_tokens: int = 0
    cross_tokens: int = 0
    height: int
    width: int
    num_frames: int
    num_inference_steps: int = 50
    forwards_per_step: int = 2
    experts: int = 1
    first_expert: float | None = None
    in_channels: int | None = None
    trained_frames: int | None = None
    trained_size: tuple[int, int] | None = None
    not_advised: tuple[str, ...] = ()
    beyond: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    head_sets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def trained(self) -> dict[str, int]:
        """Axis -> tokens along it that the model was trained on, where that is known."""
        height, width = self.trained_size or (None, None)
        known = {"frames": self.trained_frames, "height": height, "width": width}
        return {axis: tokens for axis, tokens in known.items() if tokens is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """How dit-accel meets one family of transformers.

    Attributes:
        name: the family's short name, such as ``wan``.
        transformers: names of the diffusers transformer classes this adapter covers.
        self_attention: module-name patterns (``blocks.*.attn1``) of the attention modules that methods may change, one
            pattern per block list, in the order in which the lists run.
        side_attention: the same for block lists that run beside the main ones (control branches), counted from 0.
        blocks: the block lists, in the order in which they run; None: those that hold ``self_attention``, as diffusers'
            `TransformerBlockRegistry` describes them; (): they can't be described, so that no method may act on them.
        grid: (transformer config, forward inputs by name) -> `Grid`, or in words why this forward has none; then no
            method may thin it out. It runs inside compiled graphs too: plain arithmetic on shapes only; values of
            tensors are read by `dit_accel.adapters.position_ids`.
        latents: name of the input that holds the latents, a tensor [B, ...] or a list with one per row.
        timestep: name of the input that holds the timesteps; the noisiest of them tells the step.
        sizes: transformer config -> `Sizes`; raises KeyError for one that lacks an entry.
        always_dense: transformer config -> module-name patterns out of ``self_attention`` that stay dense in it.
        separate_text_attention: besides the call over all keys there are others over fewer (text over itself); they
            stay dense.
        variable_text_length: an attention call may leave out text that the grid counts: padded text behind the visual
            tokens, row by row, or all text.
        split_text: how diffusers' context parallelism splits the attended sequence: as one stream (``none``), or text
            ``before`` or ``after`` the visual tokens apart from the rest; None: not described.
        outer_masks: masks of queries x keys are outer products of valid queries and valid keys, so that the row of a
            visual token tells the keys' validity; undeclared, that is checked at each call, which waits for the device.
        noise: which noise levels the schedulers of its released models tell, as `dit_accel.adapters.noise` names them.
        toward_clean: the prediction is clean - noise, where other flow models give noise - clean.
        flow: the prediction is noise - clean of latents (1 - sigma) clean + sigma noise, as the pipeline's scheduler
            takes it, and its latents are those that the autoencoder gives, shifted, scaled and packed.
        signal: (transformer, forward inputs by name) -> what tells how much the first block's input changed since the
            last step, made by the transformer's own embeddings: the modulated input of its first block's attention, or
            an embedding of the timestep; None: not described.
        projected_signal: the same, of the timestep's embedding as it modulates all blocks; None: not described.
        rope: where the model makes its rotary positions, or in words why it has none; None: not described.
        guidance: how the family's pipelines guide.
        cross_attention: where text comes in by cross-attention, or in words why it does not; None: not described.
        joined_text: where text joins the self-attention, or in words why no negative text can be laid beside it; None:
            not described.
        references: names of the inputs that hold reference images behind the image that is made: [..., tokens, C], or
            lists of sizes by row; text stands before the image. Or in words why there are none; None: not described.
        makes_images: the models make single images, on which methods for several frames make no sense.
        families: the released models, for `plan` and for recipes.
        recipes: method name -> option -> value for a model that none of ``families`` describes.
        refused: method name -> why it makes no sense here; `IMAGE_REFUSED` is added where a model makes images.

    Raises:
        ConfigError: for names, families or functions of another type.
    """

    name: str
    transformers: tuple[str, ...]
    self_attention: tuple[str, ...]
    side_attention: tuple[str, ...] = ()
    blocks: tuple[BlockList, ...] | None = None
    grid: Callable[[Any, Mapping[str, Any]], Grid | str] = latents_grid
    latents: str = "hidden_states"
    timestep: str = "timestep"
    sizes: Callable[[Mapping[str, Any]], Sizes] = read_sizes
    always_dense: Callable[[Mapping[str, Any]], tuple[str, ...]] | None = None
    separate_text_attention: bool = False
    variable_text_length: bool = False
    split_text: Literal["none", "before", "after"] | None = None
    outer_masks: bool = False
    noise: tuple[Noise, ...] = ("flow",)
    toward_clean: bool = False
    flow: bool = False
    signal: Callable[[Any, Mapping[str, Any]], Any] | None = None
    projected_signal: Callable[[Any, Mapping[str, Any]], Any] | None = None
    rope: Rope | str | None = None
    guidance: Guidance = Guidance()  # noqa: RUF009 - frozen
    cross_attention: CrossAttention | str | None = None
    joined_text: JoinedText | str | None = None
    references: tuple[str, ...] | str | None = None
    makes_images: bool = False
    families: tuple[Family, ...] = ()
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.makes_images:
            object.__setattr__(self, "refused", {**IMAGE_REFUSED, **self.refused})
        for name in ("transformers", "self_attention", "side_attention"):
            self._check_tuple(name, str, "names")
        self._check_tuple("families", Family, "Family objects")
        if self.blocks is not None:
            self._check_tuple("blocks", BlockList, "BlockList objects")
        for name, kind in (("rope", Rope), ("cross_attention", CrossAttention), ("joined_text", JoinedText)):
            if not isinstance(value := getattr(self, name), (kind, str, type(None))):
                raise ConfigError(
                    f"adapter {self.name!r}: {name} must be a {kind.__name__}, or a sentence that says why there is "
                    f"none, got {value!r}; give one of them"
                )
        for call, value, optional in (
            ("grid(config, inputs)", self.grid, False),
            ("sizes(config)", self.sizes, False),
            ("always_dense(config)", self.always_dense, True),
            ("signal(transformer, inputs)", self.signal, True),
            ("projected_signal(transformer, inputs)", self.projected_signal, True),
        ):
            if not callable(value) and not (optional and value is None):
                raise ConfigError(
                    f"adapter {self.name!r}: {call} must be a function, got {value!r}; give the function or a partial"
                )

    def _check_tuple(self, name: str, kind: type, what: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, tuple) or not all(isinstance(item, kind) for item in value):
            raise ConfigError(
                f"adapter {self.name!r}: {name} must be a tuple of {what}, got {value!r}; one entry is (entry,)"
            )

    def family(self, config: Mapping[str, Any], experts: int = 1) -> Family | None:
        """Return the released model of so many ``experts`` that a transformer config has the sizes of, or None.

        Of several, the first whose patches and input channels are the config's, where one is.
        """
        try:
            sizes = self.sizes(config)
        except KeyError:
            return None
        alike = [
            family
            for family in self.families
            if (family.layers, family.heads, family.head_dim) == (sizes.layers, sizes.heads, sizes.head_dim)
            and family.experts == experts
        ]
        channels = config.get("in_channels")
        return max(
            alike, key=lambda known: (known.patch == sizes.patch, known.in_channels in (None, channels)), default=None
        )

    def recipe(self, method: str, family: Family | None) -> Mapping[str, Any]:
        """Return the options that ``method`` takes on this model where the user set none."""
        return (family.recipes.get(method) if family else None) or self.recipes.get(method, {})
