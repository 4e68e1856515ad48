"""The solvers that arms may name, which are those that `generate` takes."""

from dit_accel_pipelines.solvers import BEST, DYNAMIC, SOLVERS, make_scheduler, shift_of

__all__ = ["BEST", "DYNAMIC", "SOLVERS", "make_scheduler", "shift_of"]
