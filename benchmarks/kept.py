"""Pictures of what was kept: how many values ids have, by field and tenth of the ids, the most frequent first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import escape

from benchmarks.results import SUCCESS, CellResult

Widths = dict[str, list[float]]
"""Table -> mean number of values of the ids of each tenth; fewer tenths for tables of few ids."""

_CELL, _ROW, _GAP, _TOP, _CHAR = 27, 17, 26, 40, 6.2
_LIGHT, _DARK = np.array([247, 249, 252]), np.array([33, 72, 148])


def kept_widths(results: Sequence[CellResult]) -> dict[str, Widths]:
    """Budget -> widths, means over seeds, largest budget first; of one series, of which some cells may say nothing."""
    found: dict[str, list[Widths]] = {}
    told = [result for result in results if result.status == SUCCESS and _differ(result)]
    for result in sorted(told, key=lambda result: -(result.sizes.budget_bytes or 0)):
        found.setdefault(result.budget or "no budget", []).append(result.tables["mean_widths_by_decile"])
    return {
        budget: {name: np.mean([widths[name] for widths in same], axis=0).tolist() for name in same[0]}
        for budget, same in found.items()
    }


def _differ(result: CellResult) -> bool:
    """Whether some ids have more values than others."""
    widths: Widths = result.tables.get("mean_widths_by_decile") or {}
    return len({value for own in widths.values() for value in own}) > 1


def kept_picture(kept: Mapping[str, Widths], num_values: int) -> str:
    """Draw one map per budget, side by side: fields down, tenths of their ids across.

    Args:
        kept: of `kept_widths`, not empty.
        num_values: of a whole row; darkest.

    Returns:
        SVG.
    """
    names = list(next(iter(kept.values())))
    left = 12 + _CHAR * max(map(len, names))
    panel = 10 * _CELL + _GAP
    width, height = left + panel * len(kept), _TOP + _ROW * len(names) + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" '
        f'height="{height}" font-family="system-ui, sans-serif" font-size="11" fill="#1c1f23">',
        f'<rect width="{width:.0f}" height="{height}" fill="#fff"/>',
    ]
    for row, name in enumerate(names):
        parts.append(_text(left - 6, _TOP + _ROW * (row + 0.72), name, anchor="end"))
    for number, (budget, widths) in enumerate(kept.items()):
        x = left + panel * number
        parts.append(_text(x, _TOP - 24, budget, bold=True))
        parts.append(_text(x, _TOP - 7, "frequent"))
        parts.append(_text(x + 10 * _CELL, _TOP - 7, "rare", anchor="end"))
        for row, name in enumerate(names):
            for tenth, value in enumerate(widths.get(name, [])):
                parts.append(_cell(x + tenth * _CELL, _TOP + row * _ROW, value, num_values))
    parts.append(_text(left, height - 6, f"mean number of values per id; a whole row has {num_values}"))
    return "\n".join([*parts, "</svg>"])


def _cell(x: float, y: float, value: float, num_values: int) -> str:
    share = min(value / num_values, 1.0) ** 0.5  # small widths are worth telling apart
    color = "#" + "".join(f"{round(part):02x}" for part in _LIGHT + share * (_DARK - _LIGHT))
    shown = f"{value:.0f}" if value >= 9.95 or value == round(value) else f"{value:.1f}"
    ink = "#fff" if share > 0.6 else "#1c1f23"
    box = f'<rect x="{x:.1f}" y="{y}" width="{_CELL - 1}" height="{_ROW - 1}" fill="{color}"/>'
    return box + _text(x + (_CELL - 1) / 2, y + _ROW * 0.72, shown, anchor="middle", color=ink)


def _text(x: float, y: float, text: str, anchor: str = "start", color: str = "", bold: bool = False) -> str:
    style = f' fill="{color}"' * bool(color) + ' font-weight="600"' * bold
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(text)}</text>'
