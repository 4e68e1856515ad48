"""Which noise levels a scheduler tells: the one place that knows, for all methods that read one."""

from typing import Any, Literal

Noise = Literal["flow", "exploding", "none"]
"""``flow``: sigma is the share of noise in latents (1 - sigma) clean + sigma noise. ``exploding``: sigma is noise over
signal, of clean + sigma noise or a multiple of it. ``none``: the scheduler lists no sigmas."""

NOISES: frozenset[Noise] = frozenset({"flow", "exploding"})
"""Those that say how much noise there is."""


def noise_of(scheduler: Any) -> Noise | None:
    """Return which noise levels one of diffusers' schedulers tells; None: there is no scheduler.

    Read off its config, since before a run some list no sigmas yet. EDM's bounds come before a shift: Cosmos 2 hands
    its sigmas to a scheduler of flow matching.
    """
    if scheduler is None:
        return None
    config = getattr(scheduler, "config", None) or {}
    if config.get("use_flow_sigmas"):
        return "flow"
    if config.get("sigma_max") is not None:
        return "exploding"
    if "shift" in config:
        return "flow"
    if not hasattr(scheduler, "sigmas"):
        return "none"
    return "exploding" if "beta_schedule" in config else "flow"


def listed_level(scheduler: Any, index: int) -> float | None:
    """Return the noise level at a place in a scheduler's list, falling from step to step; None where it has none."""
    sigmas = getattr(scheduler, "sigmas", None)
    # KDPM2 evaluates the model between two of its steps, at noise levels listed by themselves; the ancestral one, which
    # lists what a step comes down to, at that of the next step
    if not getattr(scheduler, "state_in_first_order", True) and not hasattr(scheduler, "sigmas_down"):
        sigmas = getattr(scheduler, "sigmas_interpol", sigmas)
    if sigmas is None or index >= len(sigmas):
        return None
    rising = (getattr(scheduler, "config", None) or {}).get("invert_sigmas")  # Mochi's: the share of what is clean
    return 1 - float(sigmas[index]) if rising else float(sigmas[index])


def share_of_noise(sigma: float, noise: Noise) -> float:
    """Return the share of noise b / (a + b) in latents a clean + b noise: what flow matching calls sigma."""
    return sigma / (1 + sigma) if noise == "exploding" else sigma
