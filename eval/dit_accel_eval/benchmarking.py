"""The command `dit-accel eval protocol`: the rules of the benchmark, its prompts, and the clips that a lead takes."""

import re
from pathlib import Path
from typing import Annotated

from dit_accel_pipelines.generation.options import Json, option
from rich.markdown import Markdown

from dit_accel import ConfigError
from dit_accel.cli.console import OUT, print_json
from dit_accel.errors import did_you_mean


def show_protocol(
    prompts: Annotated[str | None, option("Print these prompts, one a line.", metavar="choosing|judging")] = None,
    see: Annotated[list[float] | None, option("Print the clips that a lead takes; repeatable.", metavar="DB")] = None,
    results: Annotated[list[Path] | None, option("Spread for --see; default: our own.", metavar="FILE")] = None,
    arms: Annotated[int, option("Arms that are judged together, for --see.", min=1)] = 1,
    json: Json = False,
) -> None:
    """Print the rules by which accelerated models are compared, or the prompts, or the clips that a verdict takes.

    \b
    Examples:
      dit-accel eval protocol
      dit-accel eval protocol --prompts judging
      dit-accel eval protocol --see 1 --see 3 --arms 4 --results pilot.jsonl
    """
    from .protocol import PROTOCOL, USES, prompts_in_order, protocol_prompts, protocol_rules

    if prompts is not None and prompts not in USES:
        raise ConfigError(f"there are no {prompts!r} prompts; {did_you_mean(prompts, USES)}")
    if prompts and see:
        raise ConfigError("eval protocol got --prompts and --see; name one of them")
    if (results or arms > 1) and not see:
        raise ConfigError("--results and --arms go with --see; add, say, --see 1")
    if any(not lead > 0 for lead in see or ()):
        raise ConfigError(f"--see takes leads above 0 dB, got {min(see or ()):g}")
    if see:
        _show_clips(see, results or (), arms, json)
    elif json:
        rules = re.split(r"\n(?=\d+\. )", protocol_rules())
        print_json({"version": PROTOCOL, "rules": rules, "prompts": {use: protocol_prompts(use) for use in USES}})
    elif prompts:
        print("\n".join(prompts_in_order(prompts)))
    else:
        OUT.print(f"The protocol of accelerated models, version {PROTOCOL}\n")
        OUT.print(Markdown(protocol_rules()))


def _show_clips(see: list[float], results: "list[Path] | tuple[()]", arms: int, json: bool) -> None:
    """Print how many clips it takes to see leads, for the spread of the arm of median spread in each file."""
    from .protocol import CHANCE, clips_for, committed, power_table, typical
    from .report.lines import read_results
    from .statistics import FEWEST
    from .suites.figures import Comparison

    spreads = [] if results else committed()
    for path in results:
        comparison = Comparison(lines := read_results(path).lines)
        key = "steps_in_time" if all(line.steps_in_time is not None for line in lines) else "work"
        leads = {name: [*comparison.leads(name, key).values()] for name in {line.arm: None for line in lines}}
        leads = {name: each for name, each in leads.items() if len(each) >= FEWEST}
        if not leads:
            raise ConfigError(f"{path} has no arm with {FEWEST} clips beside fewer steps; run more, or leave it out")
        spreads.append(typical(path.stem, leads))
    if not json:
        together = "1 arm" if arms == 1 else f"{arms} arms judged together"
        print(f"Clips that give a true lead its verdict {CHANCE:.0%} of the time; {together}.\n")
        return print(power_table(spreads, see, arms))
    print_json([
        {"results": spread.results, "arm": spread.arm, "deviation": spread.deviation, "arms": arms,
         "clips": {f"{lead:g}": clips_for(spread.leads, lead, arms=arms) for lead in see}} for spread in spreads
    ])  # fmt: skip
