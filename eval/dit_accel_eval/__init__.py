"""Quality and speed evaluation: fidelity to dense attention, the rule checker's verdict, paired statistics, tuning."""

from .bench_command import bench_model
from .commands import eval_app
from .tune import tune_app

COMMANDS = {"bench": bench_model, "eval": eval_app, "tune": tune_app}

__all__ = ["COMMANDS"]
