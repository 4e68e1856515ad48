"""The report in a notebook: its lines, a table of its steps, and the density map inline."""

import base64
from html import escape
from typing import Any

from .heat_map import heat_map_png

_COLUMNS = ("transformer", "step", "branch", "dense", "planned", "density", "pooled")


def report_html(report: Any) -> str:
    """Return a report as one piece of HTML that needs nothing else."""
    lines = "<br>".join(escape(line) for line in str(report).splitlines())
    return f"<div><p>{lines}</p>{_table(report)}{_picture(report)}</div>"


def _table(report: Any) -> str:
    if not report.steps:
        return ""
    head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    rows = "".join(
        f"<tr><td>{escape(step.transformer)}</td><td>{step.step_index}</td><td>{escape(step.branch)}</td>"
        f"<td>{step.dense_layers}</td><td>{step.sparse_layers}</td><td>{step.density:.3f}</td>"
        f"<td>{step.pooled:.3f}</td></tr>"
        for step in report.steps
    )
    return f"<details><summary>steps</summary><table><tr>{head}</tr>{rows}</table></details>"


def _picture(report: Any) -> str:
    image = heat_map_png(report)
    if image is None:
        return ""
    data = base64.b64encode(image).decode()
    return f'<img alt="kept share by step and layer" src="data:image/png;base64,{data}">'
