"""Check an adapter: tiny random transformers of its classes run every identity and invariant that applies, on a CPU.

What is checked is the meeting of model and core: which modules are touched, where the tokens lie, that nothing changes
where nothing should, and that a planned call computes what its plan says. What a method is worth is not checked.
"""

from collections.abc import Callable, Collection

from ..adapters.adapter import Adapter
from . import method_checks, model_checks
from .block_checks import check_blocks
from .cache_checks import check_block_caches, check_caches
from .guidance_checks import check_guidance
from .recording import require
from .rope_checks import check_rope
from .tiny_models import Case, TinyModel, require_patterns_match


def check_adapter(
    adapter: Adapter, *models: TinyModel, only: Collection[str] | None = None
) -> dict[str, dict[str, str]]:
    """Run every identity and invariant that applies to an adapter.

    Args:
        adapter: the adapter, registered by its entry point.
        models: one tiny model or more of each transformer class that the adapter covers.
        only: names of `CHECKS`; None: all of them, and every class must have a model.

    Returns:
        Model -> check -> "passed", or why it does not apply.

    Raises:
        AssertionError: for the first check that fails; it names the transformer class and the check.
    """
    named, classes = set(adapter.transformers), {model.transformer.__name__ for model in models}
    require(
        bool(models),
        f"check_adapter({adapter.name!r}) was given no tiny model and would check nothing; give a TinyModel of each of "
        f"{', '.join(sorted(named))}",
    )
    require(
        classes <= named if only is not None else classes == named,
        f"adapter {adapter.name!r} names {', '.join(sorted(named))}, tiny models were given of "
        f"{', '.join(sorted(classes))}; give one or more of each class that it names, and of no other",
    )
    checks = {name: CHECKS[name] for name in (CHECKS if only is None else only)}
    verdicts: dict[str, dict[str, str]] = {}
    cases = [Case(adapter, model) for model in models]
    if "places" in checks and classes == named:
        require_patterns_match(adapter, cases)
    for number, (model, case) in enumerate(zip(models, cases, strict=True)):
        case.require_own_forward(f"{model.transformer.__name__} {number}")
        results = verdicts[f"{model.transformer.__name__} {number}"] = {}
        for name, check in checks.items():
            try:
                results[name] = check(case) or "passed"
            except Exception as error:
                description = f"{model.transformer.__name__} {number}: check {name!r} failed: {error}"
                raise AssertionError(description) from error
    return verdicts


CHECKS: dict[str, Callable[[Case], str | None]] = {
    "places": model_checks.check_places, "neutral": method_checks.check_neutral, "full": model_checks.check_full,
    "layout": model_checks.check_layout, "blocks": check_blocks, "rope": check_rope,
    "signal": model_checks.check_signal, "caches": check_caches, "block caches": check_block_caches,
    "active": method_checks.check_active, "batch": method_checks.check_batch, "padding": method_checks.check_padding,
    "pairs": method_checks.check_pairs, "guidance": check_guidance, "refused": model_checks.check_refused,
    "compile": model_checks.check_compile,
}  # fmt: skip
"""Name -> check, in the order in which they run; each raises `AssertionError`, or tells why it does not apply."""
