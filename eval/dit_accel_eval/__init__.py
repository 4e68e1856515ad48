"""Quality and speed evaluation: fidelity to dense attention, the rule checker's verdict, paired statistics, tuning."""

from .bench.command import bench_model
from .commands import eval_app
from .tune.commands import tune_app

COMMANDS = {"bench": bench_model, "eval": eval_app, "tune": tune_app}

__all__ = ["COMMANDS"]
