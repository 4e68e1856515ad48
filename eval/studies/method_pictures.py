"""Draws the pictures of docs/methods/ from runs: `python eval/studies/method_pictures.py METHOD ...` (none: all).

Every video is of the first held-out prompt of wan-tiny, and every picture of the first ones of flux-tiny, with the seed
that is the prompt's number; none was chosen by its look. Settings are those of the suites in eval/suites/.
"""

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from dit_accel_assets import held_out_prompts, model_defaults, model_path
from dit_accel_kernels import unpack_bits
from dit_accel_kernels.tiles import EXACT, POOLED
from method_pages import FOLDER
from PIL import Image
from scipy.linalg import toeplitz
from strips import beside, block_strip, map_picture, rows_picture, save

import dit_accel as d
from dit_accel.attachment.layers import PlannedCall
from dit_accel.methods.config import MethodConfig

LAYER = 5
"""The layer whose tiles are drawn, the sixth of twelve; of its first head, in the run's last step."""

FRAMES, CACHED, LONG = [0, 8, 16], [0, 5, 10, 16], [0, 12, 24, 36, 48]
"""Frames that are drawn, by the kind of picture."""

SPARSE: Mapping[str, Any] = dict(block_size=16, dense_steps=2, dense_layers=0)

Clip = np.ndarray
"""Frames [F, height, width, 3] from 0 to 1; of a picture one."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of an embedded model: whether each block ran at each step, and the conditional calls of `LAYER`."""

    frames: Clip
    computed: np.ndarray
    calls: list[PlannedCall] = field(default_factory=list)


@cache
def pipeline(model: str) -> Any:
    """Return an embedded model's pipeline, without its progress bar."""
    pipe: Any = DiffusionPipeline.from_pretrained(model_path(model), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def run(model: str, methods: tuple[MethodConfig, ...], prompt: int = 0, **call: Any) -> Run:
    """Run an embedded model's pipeline on a held-out prompt, with its number as seed."""
    pipe, step, ran, calls = pipeline(model), 0, set(), []
    blocks = [block for name in ("blocks", "transformer_blocks", "single_transformer_blocks")
              for block in getattr(pipe.transformer, name, ())]  # fmt: skip
    settings = {**model_defaults(model), **call}

    def ended(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        nonlocal step
        step = index + 1
        return values

    def seen(call: PlannedCall) -> None:
        if call.context.layer == LAYER and call.context.branch == "cond":
            calls.append(call)

    with d.attach(pipe, *methods, preset="none") as attachment, attachment.observe(seen):
        hooks = [
            block.register_forward_hook(lambda *_, number=number: ran.add((number, step)))
            for number, block in enumerate(blocks)
        ]
        result = pipe(
            held_out_prompts(model, prompt + 1)[prompt], generator=torch.Generator().manual_seed(prompt),
            output_type="np", callback_on_step_end=ended, **settings,
        )  # fmt: skip
        for hook in hooks:
            hook.remove()
    computed = np.zeros((len(blocks), settings["num_inference_steps"]), dtype=bool)
    for place in ran:
        computed[place] = True
    frames = result.frames[0] if hasattr(result, "frames") else result.images
    return Run(frames=np.asarray(frames), computed=computed, calls=calls)


def difference(first: Clip, second: Clip) -> Clip:
    """Return five times the distance of two clips, at most 1."""
    return np.minimum(1.0, 5.0 * np.abs(first - second))


def tile_states(call: PlannedCall) -> np.ndarray:
    """Return the states of a call's tiles in its first head, [query tiles, key tiles]: 0 skipped, 1 pooled, 2 exact."""
    tiles = call.plan.tiles
    assert tiles is not None
    states = tiles.states()[0].numpy()
    if call.exact is None:
        return states
    exact, selection = unpack_bits(call.exact, tiles.key_tiles)[0, 0].numpy(), call.plan.selection
    pools = selection is not None and (selection.rest == "pooled" or selection.routing is not None)
    return np.where(exact, EXACT, POOLED if pools else 0)


def sparse(*methods: MethodConfig, plain: tuple[MethodConfig, ...] = (), steps: int = 12) -> Image.Image:
    """Draw frames of a dense run over those of a sparse one and the difference; beside them the tiles of one call."""
    dense = run("wan-tiny", (), num_inference_steps=steps)
    names = {"dense": dense}
    if plain:
        names[type(plain[0]).__name__] = run("wan-tiny", plain, num_inference_steps=steps)
    names[("+ " if plain else "") + type(methods[0]).__name__] = run("wan-tiny", methods, num_inference_steps=steps)
    rows = []
    for name, clip in names.items():
        rows.append((name, clip.frames[FRAMES]))
        if clip is not dense:
            rows.append(("difference x 5", difference(clip.frames, dense.frames)[FRAMES]))
    states = tile_states(list(names.values())[-1].calls[-1])
    share = (states == EXACT).mean()
    tiles = map_picture(states, {0: "skipped", POOLED: "pooled", EXACT: "exact"}, f"tiles: {share:.0%} exact")
    return beside(rows_picture(rows, scale=2), tiles)


def cached(method: MethodConfig, *, model: str = "wan-tiny") -> Image.Image:
    """Draw frames (of an image model pictures) of a dense run, of one with a cache, and what ran of it below."""
    prompts, which = (1, CACHED) if model == "wan-tiny" else (3, [0])
    both = [[run(model, methods, number) for number in range(prompts)] for methods in ((), (method,))]
    dense, cached = (np.concatenate([clip.frames[which] for clip in runs]) for runs in both)
    rows = [("dense", dense), (type(method).__name__, cached), ("difference x 5", difference(cached, dense))]
    return rows_picture(rows, scale=2, below=lambda width: block_strip(both[1][0].computed, width))


def longer(*methods: MethodConfig, side: Callable[[Run], Image.Image]) -> Image.Image:
    """Draw a clip of three times the trained length, plain and with methods, and a picture of one of its calls."""
    call = dict(num_inference_steps=8, num_frames=49)
    plain, other = run("wan-tiny", (), **call), run("wan-tiny", methods, **call)
    rows = [("plain", plain.frames[LONG]), (type(methods[0]).__name__, other.frames[LONG])]
    return beside(rows_picture(rows, scale=1.5), side(other))


def decayed(result: Run) -> Image.Image:
    """Draw which pairs of frames decay, of a run with UltraViCo."""
    decay = result.calls[-1].plan.frame_decay
    assert decay is not None
    decays = toeplitz(decay.table.numpy() < 1) + 0
    return map_picture(decays, {1: "decays", 0: "unchanged"}, "frame by frame", 175)


def frames_seen(result: Run) -> Image.Image:
    """Draw which frames see which, of a run with LVSA and tiles of a frame."""
    return map_picture(tile_states(result.calls[-1]), {0: "skipped", EXACT: "seen"}, "frame by frame", 175)


def larger(method: MethodConfig) -> Image.Image:
    """Draw pictures of twice the trained side, plain and with a method."""
    call = dict(num_inference_steps=10, height=192, width=192)
    rows = [
        (name, [run("flux-tiny", methods, number, **call).frames[0] for number in range(2)])
        for name, methods in (("plain", ()), (type(method).__name__, (method,)))
    ]
    return rows_picture(rows, scale=1)


def guided(make: Callable[[float], MethodConfig], scales: Sequence[float], *, guidance: float = 3.0) -> Image.Image:
    """Draw pictures without a method, then with it at some scales."""
    call = dict(num_inference_steps=10, true_cfg_scale=guidance)
    arms = [("without", ()), *((f"scale {scale:g}", (make(scale),)) for scale in scales)]
    rows = [(name, [run("flux-tiny", arm, number, **call).frames[0] for number in range(3)]) for name, arm in arms]
    return rows_picture(rows, scale=2)


def foreground(method: MethodConfig) -> Image.Image:
    """Draw frames of a dense run and of one with DFA, with what attends in the last of its steps that is not full."""
    dense, other = run("wan-tiny", ()), run("wan-tiny", (method,))
    reused = [call.plan.reused for call in other.calls if call.plan.reused is not None][-1]
    assert reused is not None
    attends = np.zeros(other.calls[-1].context.layout.visual_tokens)
    attends[reused.rows[0].numpy()] = 1.0
    mask = attends.reshape(-1, 8, 8).repeat(8, 1).repeat(8, 2)  # [latent frames, height, width]
    marked = [other.frames[index] * (0.25 + 0.75 * mask[(index + 1) // 2][..., None]) for index in CACHED]
    rows = [("dense", dense.frames[CACHED]), ("DFA", other.frames[CACHED]), ("what attends", marked)]
    full = np.zeros((1, other.computed.shape[1]), dtype=bool)
    for call in other.calls:
        full[0, call.context.step_index] |= call.plan.reused is None
    return rows_picture(rows, scale=2, below=lambda width: block_strip(full, width, ("full", "foreground alone")))


@cache
def weaker() -> Any:
    """Return flux-tiny's transformer with noise of a fifth of each weight's deviation added."""
    transformer, noise = copy.deepcopy(pipeline("flux-tiny").transformer), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in transformer.parameters():
            weight += 0.2 * weight.std(correction=0) * torch.randn(weight.shape, generator=noise)
    return transformer


RADIAL = d.RadialAttention(decay_factor=0.2, near="half", **SPARSE)
SPARSED = d.SparseD(density=0.3, **SPARSE)
PICTURES: Mapping[str, Callable[[], Image.Image]] = {
    "radial": lambda: sparse(RADIAL),
    "sol": lambda: sparse(d.SolAttention(beta=0.0, **SPARSE)),
    "lite": lambda: sparse(d.LiteAttention(threshold=-4.0, **SPARSE)),
    "sparsed": lambda: sparse(SPARSED),
    "delta": lambda: sparse(d.DeltaAttention(stride=8), SPARSED, plain=(SPARSED,)),
    "easycache": lambda: cached(d.EasyCache(threshold=0.1, predictor="taylor")),
    "seacache": lambda: cached(d.SeaCache(threshold=0.4, predictor="taylor")),
    "magcache": lambda: cached(d.MagCache(threshold=0.06, predictor="taylor")),
    "teacache": lambda: cached(d.TeaCache(threshold=0.1, predictor="taylor")),
    "staticcache": lambda: cached(d.StaticCache(every=2, predictor="taylor")),
    "progressive": lambda: cached(d.ProgressiveResolution(until=0.9), model="flux-sizes").crop((0, 0, 710, 588)),
    "profilingcache": lambda: cached(d.ProfilingCache(blocks="0-5", every=3, warmup_steps=2, last_steps=1)),
    "dbprune": lambda: cached(d.DBPrune(threshold=0.15)),
    "cfgcache": lambda: cached(d.CFGCache()),
    "dbcache": lambda: cached(d.DBCache(threshold=0.1, first_blocks=2, predictor="taylor"), model="flux-tiny"),
    "firstblockcache": lambda: cached(d.FirstBlockCache(threshold=0.1, predictor="taylor"), model="flux-tiny"),
    "dfa": lambda: foreground(d.DFA()),
    "referencecache": lambda: map_picture(
        np.array([[1] * 12, [1] * 12, [1, 0, 0, 0] * 3]), {0: "kept", 1: "computed"}, "text, picture, references", 420
    ),
    "ultravico": lambda: longer(d.UltraViCo(alpha=0.9), side=decayed),
    "lvsa": lambda: longer(d.LVSA(), side=frames_seen),
    "ultraimage": lambda: larger(d.UltraImage()),
    "slg": lambda: guided(lambda scale: d.SLG(layers="L6", scale=scale, start=0.0, stop=1.0), (1.0, 3.0)),
    "pag": lambda: guided(lambda scale: d.PAG(layers="L5", scale=scale), (1.0, 3.0)),
    "softpag": lambda: guided(lambda scale: d.SoftPAG(heads="L3H1, L8H0", u=1.0, scale=scale), (1.0, 3.0)),
    "seg": lambda: guided(lambda scale: d.SEG(layers="L5", sigma=2.0, scale=scale), (1.0, 3.0)),
    "autoguidance": lambda: guided(lambda scale: d.AutoGuidance(weak_transformer=weaker(), scale=scale), (1.0, 3.0)),
    "nag": lambda: guided(lambda scale: d.NAG(negative_prompt="", scale=scale), (3.0, 5.0), guidance=1.0),
}
"""Method -> how its picture is drawn; those of the other methods are elsewhere in docs/."""


def main() -> None:
    """Draw the pictures of the named methods, of all if none is named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("methods", nargs="*", metavar="METHOD")
    for name in parser.parse_args().methods or PICTURES:
        save(PICTURES[name](), FOLDER / f"{name}.png")


if __name__ == "__main__":
    main()
