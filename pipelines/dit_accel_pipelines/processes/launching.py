"""Starts the processes that share a command's work, through accelerate's own launcher, and ends as they end."""

import logging
import os
import signal
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from dit_accel.cli.console import print_error
from dit_accel.cli.stopping import STOP
from dit_accel.errors import ConfigError

from .parallel import check_processes
from .processes import Process


def starts_processes(
    count: int, device: str | None, *, together: int = 1, environ: Mapping[str, str] = os.environ
) -> bool:
    """Tell whether this process is to start others: not where it is one of those, or alone.

    Args:
        count: how many there shall be on this machine, each on a device of its own.
        device: the kind of device, such as ``cuda``; None is the accelerator's. On ``cpu`` all share it.
        together: how many of them make each output together.

    Raises:
        ConfigError: for more processes than devices, a count that ``together`` does not divide, or another launcher's
            processes.
    """
    if count == 1:
        return False
    started = environ.get("WORLD_SIZE")
    if started is not None:
        if started != str(count):
            raise ConfigError(f"gpus = {count} starts processes, and a launcher started {started}; leave it out")
        return False
    check_processes(count, together)
    if Process(count=count, local_count=count).device(device) is None:
        raise ConfigError(f"gpus = {count}, and there is no accelerator; --device cpu starts as many on the CPU")
    return True


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run ``dit-accel`` with these arguments in processes of this machine; returns the exit code of the first to fail.

    Each says itself why it fails, and the others are ended then.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = {"num_processes": count, "num_machines": 1, "machine_rank": 0, "main_process_port": 0}
    options |= {"mixed_precision": "no", "dynamo_backend": "no", "gpu_ids": "all"}  # nothing of a training is set up
    words = ["--multi_gpu", *(f"--{name}={value}" for name, value in options.items()), "-m", "dit_accel", *arguments]
    logging.disable(logging.ERROR)  # torch's launcher would repeat each failure
    try:
        launch_command(launch_command_parser().parse_args(words))
    except SignalException as stopped:
        STOP.number = stopped.sigval
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        print_error(f"process {rank} of {count} was ended by {name}, and with it the others; {STOP.files}")
        return 1
    finally:
        logging.disable(logging.NOTSET)
    return 0


def refuse_cfg_parallel(requested: bool) -> None:
    """Refuse to spread guidance's two forwards, for which diffusers has no configuration."""
    if requested:
        raise ConfigError(
            f"--cfg-parallel runs guidance's two forwards on two devices, and diffusers {version('diffusers')} can't; "
            "use --ulysses 2, which shares each of them"
        )
