"""Check one method on tiny models: everything that `promises` holds a method to."""

from ..adapters.installed import adapter_for
from .method_cases import MethodCase
from .promises import PROMISES
from .tiny_models import Case, TinyModel, tiny_wan


def check_method(tried: MethodCase, *models: TinyModel) -> dict[str, list[str]]:
    """Check that a method keeps every promise of `dit_accel.testing.promises` that applies to it, on tiny models.

    Args:
        tried: two settings of the method, which an installed package must register.
        models: the models; none: a tiny Wan transformer.

    Returns:
        Model -> the names of the promises that were checked and kept.

    Raises:
        AssertionError: for the first promise that is broken.
        ConfigError: for a method that is not registered.
        UnsupportedModel: for a model that no installed adapter covers.
    """
    passed: dict[str, list[str]] = {}
    for number, model in enumerate(models or (tiny_wan(),)):
        case, name = Case(adapter_for(model.transformer.__name__), model), f"{model.transformer.__name__} {number}"
        case.require_own_forward(name)
        passed[name] = [promise for promise, check in PROMISES.items() if check(case, tried) is None]
    return passed
