"""Quality and speed evaluation: fidelity to dense attention, the rule checker's verdict, paired statistics, tuning."""

from .tune import tune_method

COMMANDS = {"tune": tune_method}

__all__ = ["COMMANDS"]
