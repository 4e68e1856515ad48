"""What a CLIP model of open_clip's says of a clip: how near to its prompt, its reference and itself, and how pretty."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dit_accel import ConfigError

from .metric import FAMILY, Measured, Metric, Sample, mean_of, neighbours
from .openclip import Weighted, fetch_model, no_library, weighted
from .weights import SetUp, folder

HEADS = "https://github.com/LAION-AI/aesthetic-predictor/raw/main"
PUBLISHED = tuple(f"sa_0_4_vit_{size}_linear.pth" for size in ("l_14", "b_32", "b_16"))  # over OpenAI's weights


def clip_score(by: Weighted, sample: Sample) -> Measured:
    """Return 100 times the cosine of the prompt and each frame, at least 0: the mean over frames, and each frame's."""
    seen, read = _both(by, sample)
    return mean_of((100 * seen @ read).clamp(min=0).tolist())


def alignment(by: Weighted, sample: Sample) -> Measured:
    """Return the cosine of the prompt and the whole clip, the mean of its frames' embeddings; and each frame's."""
    seen, read = _both(by, sample)
    return Measured(value=float(normalize(seen.mean(0), dim=0) @ read), by_frame=tuple((seen @ read).tolist()))


def likeness(by: Weighted, sample: Sample) -> Measured:
    """Return the cosine of each frame and the reference's: the mean over frames, and each frame's."""
    clip, reference = map(by.embedder().pictures, sample.pair())
    return mean_of((clip * reference).sum(1).tolist())


def _both(by: Weighted, sample: Sample) -> tuple[Tensor, Tensor]:
    """Return the unit embeddings of the frames, [F, D], and of the prompt, [D]."""
    return by.embedder().pictures(sample.frames), by.embedder().text(sample.prompt)


def consistent(seen: Tensor) -> Tensor:
    """Return how alike embeddings [F, D] are, half to the one before, half to the first: cosines of at least 0."""
    before, first = (seen[1:] * seen[:-1]).sum(1), seen[1:] @ seen[0]
    return (before.clamp(min=0) + first.clamp(min=0)) / 2


def consistency(by: Weighted, sample: Sample) -> Measured:
    """Return the mean of `consistent` over frames, and each frame's."""
    return mean_of(consistent(by.embedder().pictures(neighbours(sample))).tolist())


def aesthetic(by: Weighted, sample: Sample) -> Measured:
    """Return LAION's aesthetic score, about 1 to 10: the mean over frames, and each frame's."""
    with torch.inference_mode():
        return mean_of(_head(by)(by.embedder().pictures(sample.frames))[:, 0].tolist())


def head_path(model: Weighted) -> Path:
    """Return where the aesthetic head of a model lies: beside VBench's, by LAION's name."""
    short = model.model.removesuffix("-quickgelu").lower().replace("-", "_")
    return folder() / "vbench" / "aesthetic_model" / "emb_reader" / f"sa_0_4_{short}_linear.pth"


def no_head(model: Weighted) -> str | None:
    """Return why a model's aesthetic head can't be had, None if it can; another model's is refused."""
    path = head_path(model)
    if path.is_file():
        _head(model)
        return None
    published = f"{HEADS}/{path.name}" if path.name in PUBLISHED else f"one of your own for {model.model}"
    return f"the aesthetic head is not here: put {published} at {path}"


def set_up_models(names: Sequence[str]) -> SetUp:
    """Fetch models of open_clip's."""
    if (reason := no_library()) is not None:
        raise ConfigError(reason)
    models = [weighted(name) for name in names]
    failed = {model: fetch_model(model) for model in models}
    there = [f"{model} is at {model.path()}" for model in models if failed[model] is None]
    there += [f"for aesthetic@open_clip:{model}, {lack}" for model in models if (lack := no_head(model)) is not None]
    data = {str(model): {"path": str(model.path() or ""), "missing": failed[model]} for model in models}
    return SetUp(data, there, [reason for reason in failed.values() if reason])


def _head(model: Weighted) -> torch.nn.Linear:
    """Return a model's aesthetic head; a file that is none, or one of another width, is refused."""
    import open_clip

    path, head = head_path(model), torch.nn.Linear((open_clip.get_model_config(model.model) or {})["embed_dim"], 1)
    try:
        head.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch's readers raise all kinds
        reason = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(f"{path} is no aesthetic head of {model.model} ({reason}); download it again") from None
    return head


def _family(
    name: str, look: Callable[[Weighted, Sample], Measured], lack: Callable[[Weighted], str | None] = lambda _: None,
    **about: Any,
) -> Metric:  # fmt: skip
    """Return what stands for a metric of every model; ``look`` measures by one, ``lack`` tells what that lacks."""

    def of(text: str) -> Metric:
        model = Weighted(text) if no_library() else weighted(text)
        return replace(
            family, name=f"{name}:{text}", words=f"{family.words}, {text}", measure=partial(look, model), of=None,
            missing=lambda: no_library() or lack(model) or model.missing(),
        )  # fmt: skip

    family = Metric(
        name=name + FAMILY, of=of, missing=lambda: no_library() or NAMELESS, measure=lambda sample: np.nan, **about
    )
    return family


NAMELESS = "name a model with its weights, MODEL/TAG or MODEL=FILE, such as ViT-B-32/openai"

CLIP_SCORES = (
    _family(
        "clip-score@open_clip", clip_score, words="CLIP score", better="more", bounds=(0.0, 100.0), reference=False,
        prompt=True, decimals=2,
        source="Hessel et al. 2021 (arXiv 2104.08718) without its factor: 100 max(cosine, 0) of prompt and frame, mean "
        "over frames; open_clip's model, tokenizer and preparation",
    ),
    _family(
        "clip-align@open_clip", alignment, words="prompt alignment", better="more", bounds=(-1.0, 1.0),
        reference=False, prompt=True,
        source="cosine of the prompt and the mean of the frames' unit embeddings; open_clip",
    ),
    _family(
        "clip-image@open_clip", likeness, words="CLIP likeness to the reference", better="more", bounds=(-1.0, 1.0),
        reference=True, decimals=4,
        source="cosine of each frame's embedding and the reference frame's, mean over frames; open_clip",
    ),
    _family(
        "consistency@open_clip", consistency, words="consistency of frames", better="more", bounds=(0.0, 1.0),
        reference=False, decimals=4,
        source="VBench's formula of background consistency (arXiv 2311.17982), which takes ViT-B-32/openai; open_clip",
    ),
    _family(
        "aesthetic@open_clip", aesthetic, no_head, words="aesthetic score", better="more", bounds=(-np.inf, np.inf),
        reference=False, decimals=2,
        source="LAION's linear aesthetic predictor (sa_0_4) over unit embeddings, mean over frames, about 1 to 10; "
        "open_clip",
    ),
)  # fmt: skip
"""Families: each gives a metric for any of open_clip's models."""
