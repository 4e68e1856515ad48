"""The command line: `dit-accel`. Nothing here imports torch or diffusers before a command needs it."""

from .app import main, run_alone
from .method_options import MethodList, Preset, RunTable, SettingList

__all__ = ["MethodList", "Preset", "RunTable", "SettingList", "main", "run_alone"]
