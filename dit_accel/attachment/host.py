"""A model that another host than diffusers samples, such as ComfyUI: it says where each forward stands."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..adapters.adapter import Adapter
from ..methods.base import Handler
from ..methods.caches.engine import StepCacheHandler
from ..plan.context import StepContext
from .engine import Engine
from .forward_state import NO_GRID
from .layers import Branch
from .site import TransformerSite
from .state import DenoisingState


class HostedModel:
    """One model in one run with methods on it, of which those that act on attention act, and caches by `around`.

    The host calls its ``engine`` as the wrapper around diffusers' forwards does.
    """

    def __init__(self, name: str, model: Any, adapter: Adapter, handlers: Sequence[Handler], backend: str) -> None:
        self.engine = Engine(handlers, backend)
        self._state = self.engine.add_transformer(name, model, adapter)
        self._denoising = DenoisingState(None, self.engine)
        site = TransformerSite(self._denoising, self._state, [], None, compiled_whole=False)
        for handler in handlers:
            if isinstance(handler, StepCacheHandler):
                handler.install(site)
        self.caches = site.forwards  # what runs around forwards; a host may clear it
        self.engine.begin_run()

    @contextmanager
    def denoising(
        self, branch: str, batch: int | None, step_index: int, num_inference_steps: int | None, sigma: float | None
    ) -> Iterator[StepContext]:
        """Let the forward inside the block be of a branch, some rows and a step; its calls tell its layout."""
        self.engine.forward.lay(NO_GRID)
        self.engine.forward.batch = batch
        self._denoising.stand(step_index, num_inference_steps, sigma)
        self._state.branches.append(Branch(branch, {"step_index": step_index}))
        try:
            yield self._denoising.context(self._state)
        finally:
            self._denoising.leave(self._state)

    def around(self, inputs: Mapping[str, Any], run: Callable[[], Any]) -> Any:
        """Return a cache's forecast of the forward, or ``run()``; inputs are named as the adapter names them."""
        return self.caches[0](self._denoising.forward_context(self._state, inputs), run)
