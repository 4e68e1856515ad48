"""Quality and speed evaluation: fidelity to dense attention, the rule checker's verdict, paired statistics, tuning."""

from .commands import eval_app
from .tune import tune_method

COMMANDS = {"eval": eval_app, "tune": tune_method}

__all__ = ["COMMANDS"]
