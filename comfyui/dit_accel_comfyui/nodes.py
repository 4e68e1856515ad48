"""The nodes, by ComfyUI's V3 node API."""

from typing import Any

from comfy_api.latest import ComfyExtension, io, ui  # type: ignore[import-not-found]  # ComfyUI's own, where it runs

from dit_accel import SolAttention

from .patch import patch_of, with_method

CATEGORY = "dit-accel"
SPARSE = ("sol", "sparsed", "radial", "lite")
LONG = ("ultravico", "lvsa")
CACHES = ("easycache", "seacache", "staticcache", "magcache")
BACKENDS = ("auto", "triton", "torch", "flex", "fa4", "reference")


def _options(of: str) -> Any:
    tip = f"Further options of the method, a line each, such as {of}. A wrong line leaves the method out."
    return io.String.Input("options", default="", multiline=True, tooltip=tip)


class Sparse(io.ComfyNode):
    """Sparse self-attention."""

    @classmethod
    def define_schema(cls) -> Any:
        """Return the node's inputs and outputs."""
        return io.Schema(
            node_id="DitAccelSparse",
            display_name="dit-accel Sparse Attention",
            category=CATEGORY,
            description="Sparse self-attention. Calls that it can't take go to the attention set before (Sage, Flash).",
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input("method", options=list(SPARSE), default="sol", tooltip="sol for any model"),
                io.Float.Input(
                    "dense_steps", default=0.2, min=0.0, max=1.0, step=0.05, tooltip="First share of steps kept dense"
                ),
                io.Int.Input(
                    "min_tokens", default=SolAttention.worthwhile_tokens, min=1, max=1 << 24,
                    tooltip="Fewer tokens stay dense",
                ),
                io.Combo.Input("backend", options=list(BACKENDS), default="auto"),
                _options("beta = 1.3"),
            ],
            outputs=[io.Model.Output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, method: str, dense_steps: float, min_tokens: int, backend: str, options: str) -> Any:
        """Return the model with the method on it."""
        share = 0 if dense_steps == 0 else min(dense_steps, 0.999)
        return io.NodeOutput(with_method(model, method, options, backend, dense_steps=share, min_tokens=min_tokens))


class LongVideo(io.ComfyNode):
    """Videos longer than the model was trained on."""

    @classmethod
    def define_schema(cls) -> Any:
        """Return the node's inputs and outputs."""
        return io.Schema(
            node_id="DitAccelLongVideo",
            display_name="dit-accel Long Video",
            category=CATEGORY,
            description="Clips longer than trained. Shorter ones, and models without frames, are left as they are.",
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input(
                    "method", options=list(LONG), default="ultravico",
                    tooltip="ultravico keeps clips from looping; lvsa is faster, too, and takes no further lists",
                ),
                io.Int.Input(
                    "trained_frames", default=21, min=1, max=4096,
                    tooltip="Latent frames of the clips that the model was trained on: 21 for Wan's 81 frames",
                ),
                _options("alpha = 0.9"),
            ],
            outputs=[io.Model.Output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, method: str, trained_frames: int, options: str) -> Any:
        """Return the model with the method on it."""
        return io.NodeOutput(with_method(model, method, options, trained_frames=trained_frames))


class Cache(io.ComfyNode):
    """Steps whose output is forecast instead of computed."""

    @classmethod
    def define_schema(cls) -> Any:
        """Return the node's inputs and outputs."""
        return io.Schema(
            node_id="DitAccelCache",
            display_name="dit-accel Step Cache",
            category=CATEGORY,
            description="Skips steps and forecasts their output; in place of ComfyUI's EasyCache.",
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input("method", options=list(CACHES), default="easycache"),
                io.Combo.Input(
                    "predictor", options=["hold", "taylor", "heun", "chebyshev"], default="hold",
                    tooltip="hold repeats the last residual, the others continue it",
                ),
                _options("threshold = 0.05"),
            ],
            outputs=[io.Model.Output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, method: str, predictor: str, options: str) -> Any:
        """Return the model with the cache on it."""
        return io.NodeOutput(with_method(model, method, options, predictor=predictor))


class Report(io.ComfyNode):
    """What the last run did."""

    @classmethod
    def define_schema(cls) -> Any:
        """Return the node's inputs and outputs."""
        return io.Schema(
            node_id="DitAccelReport",
            display_name="dit-accel Report",
            category=CATEGORY,
            description="Says step by step what ran, what stayed dense and why, and the speed-up measured in the run.",
            inputs=[
                io.Model.Input("model", tooltip="The model that the sampler took"),
                io.Latent.Input("latent", tooltip="What the sampler gave, so that this node runs after it"),
            ],
            outputs=[io.Latent.Output(), io.String.Output(display_name="report")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any, latent: Any) -> Any:
        """Return the latent as it is, and the report."""
        report = patch_of(model).last.report
        nothing = "dit-accel: no run of this model is known; connect the model that the sampler took"
        text = nothing if report is None else str(report)
        return io.NodeOutput(latent, text, ui=ui.PreviewText(text))


class Extension(ComfyExtension):
    """The nodes, as ComfyUI asks for them."""

    async def get_node_list(self) -> list[Any]:
        """Return the nodes."""
        return [Sparse, LongVideo, Cache, Report]
