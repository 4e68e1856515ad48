"""Which settings `tune pipeline` runs, by optuna: a sampler that learns from those that ran, and a pruner."""

import json
from collections.abc import Sequence

from dit_accel.errors import ConfigError

from ..suites.arms import Arm

KEPT = 3
"""Of so many settings one goes on to more prompts."""

REPEATS = 8
"""Times the number of settings that the sampler is asked: it proposes some again."""


class Proposals:
    """Proposes settings, each once: some in order, then by optuna's sampler, a kind of setting and its steps apart.

    Args:
        arms: the settings.
        first: those in order.

    Raises:
        ConfigError: without optuna.
    """

    def __init__(self, arms: Sequence[Arm], first: Sequence[Arm]) -> None:
        try:
            import optuna  # pyright: ignore[reportMissingImports]
        except ImportError:
            missing = "tune pipeline searches with optuna, which is not here: pip install 'dit-accel[tune]'"
            raise ConfigError(missing) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=KEPT)
        self._study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0), pruner=pruner)
        self._skipped = optuna.trial.TrialState.PRUNED
        self._kinds: dict[str, dict[int, Arm]] = {}
        for arm in arms:
            self._kinds.setdefault(_kind(arm), {})[arm.num_inference_steps] = arm
        for arm in first:
            self._study.enqueue_trial({"kind": _kind(arm), "steps": arm.num_inference_steps})
        steps = [arm.num_inference_steps for arm in arms]
        self._range, self._asked = (min(steps), max(steps)), REPEATS * len(arms)
        self._told: dict[str, float | None] = {}

    def next(self) -> Arm | None:
        """Return a setting that was not proposed before; None where the sampler only repeats itself."""
        for _ in range(self._asked):
            self._asked -= 1
            self._trial = self._study.ask()
            known = self._kinds[self._trial.suggest_categorical("kind", list(self._kinds))]
            steps = self._trial.suggest_int("steps", *self._range)
            self._arm = known[min(known, key=lambda count: abs(count - steps))]
            if self._arm.name not in self._told:
                return self._arm
            self.tell(self._told[self._arm.name])
        return None

    def is_behind(self, loss: float, place: int) -> bool:
        """Return whether the setting proposed last is not among the best of a round, by what is to be small."""
        self._trial.report(loss, KEPT**place)
        return self._trial.should_prune()

    def tell(self, loss: float | None) -> None:
        """Tell what the setting proposed last came to; None: it was not run."""
        self._told[self._arm.name] = loss
        self._study.tell(self._trial, loss, state=self._skipped if loss is None else None)


def _kind(arm: Arm) -> str:
    """Return what settings have in common that differ in their steps alone."""
    return json.dumps({**arm.to_dict(), "num_inference_steps": None}, sort_keys=True)
