"""Holds references that did not converge against runs of twice as many steps.

`python eval/studies/confirm_references.py` does so for all results. The search for a converged run ends where two runs
agree, so a reference whose coarser run was far off may be converged itself. Lines of such clips get what the finer run
says; those that it does not confirm stay left out of the verdicts.
"""

import argparse
from pathlib import Path

from dit_accel_eval.metrics.psnr import psnr
from dit_accel_eval.runs.loaded import EmbeddedModel
from dit_accel_eval.runs.results import read_lines, write_lines
from dit_accel_eval.suites.lines import CONFIRMED, ResultLine
from dit_accel_eval.suites.reference import default_cache, dense_run
from dit_accel_pipelines.generation.threads import one_thread
from study import RESULTS


def main() -> None:
    """Confirm what can be, and write the lines back."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, default=sorted(RESULTS.glob("*.jsonl")), help="result lines")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of dense runs (%(default)s)")
    options = parser.parse_args()
    for path in options.files:
        lines = read_lines(path)
        lost = {line["clip"]: line for line in lines if not ResultLine.of(line).is_converged}
        for clip, one in sorted(lost.items()):
            with one_thread(embedded=True):
                model, steps = EmbeddedModel(one["model"], one["call"]), one["reference_steps"]
                runs = [dense_run(model, clip, count, options.cache) for count in (steps, 2 * steps)]
            found = {"steps": 2 * steps, "agreement": psnr(runs[0].frames, runs[1].frames)}
            print(f"{path.name} clip {clip}: {steps} and {2 * steps} steps agree to {found['agreement']:.1f} dB")
            for line in lines:
                line |= {CONFIRMED: found} if line["clip"] == clip else {}
        if lost:
            write_lines(path, lines)


if __name__ == "__main__":
    main()
