"""The plot of a group of results: quality versus bytes, with error bars and the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go

from benchmarks.results import METRICS
from embcomp import format_bytes

_COLORS = (
    *("#4269d0", "#e8871e", "#d6455d", "#3aa6a0", "#3f9b4f", "#c9a000", "#9b5fc0", "#c86bb0", "#8a6242", "#6f7a86"),
    *("#00507d", "#86b300", "#a3004f", "#7d83f0", "#ff9d9a", "#2b2b2b"),
)
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "star", "hexagon", "pentagon")
_FRONT = "#1c1f23"


def styles_of(labels: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A color and a symbol for every label, the same in all plots of a report."""
    return {
        label: (_COLORS[number % len(_COLORS)], _SYMBOLS[number % len(_SYMBOLS)])
        for number, label in enumerate(sorted(set(labels)))
    }


def quality_plot(points: pd.DataFrame, styles: Mapping[str, tuple[str, str]], metric: str = "test_auc") -> go.Figure:
    """Plot a group.

    Args:
        points: of `benchmarks.frames.point_frame`.
        styles: label -> color and symbol.
        metric: on the vertical axis.
    """
    figure = go.Figure()
    _add_front(figure, points[points.on_front], metric)
    for label, series in points.sort_values("bytes").groupby("label", sort=True):
        figure.add_trace(_series(str(label), series, styles[str(label)], metric))
    title = METRICS[metric].title
    plain = points[(points.strategy == "full") & (points.bytes == points.float32_bytes)]
    if len(plain):
        figure.add_hline(
            float(plain[metric].mean()),
            line={"color": "#9aa3ad", "width": 1, "dash": "dot"},
            annotation={"text": "float32", "font": {"color": "#6f7a86", "size": 11}, "xanchor": "left"},
            annotation_position="top left",
        )
    figure.update_layout(
        template="plotly_white",
        height=520,
        margin={"l": 70, "r": 20, "t": 46, "b": 60},
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#1c1f23"},
        legend={"title": "", "itemsizing": "constant"},
        xaxis=_byte_axis(points),
        yaxis={"title": f"{title} ({'higher' if METRICS[metric].higher_is_better else 'lower'} is better)"},
        updatemenus=[_unit_buttons(figure, points), _range_buttons(points, metric)],
    )
    return figure


def _series(label: str, series: pd.DataFrame, style: tuple[str, str], metric: str) -> go.Scatter:
    color, symbol = style
    return go.Scatter(
        x=series.bytes,
        y=series[metric],
        error_y={"array": series[f"{metric}_std"].fillna(0), "thickness": 1.2, "width": 3},
        customdata=series.share,
        name=label,
        mode="lines+markers",
        line={"color": color, "width": 1},
        marker={"color": color, "symbol": symbol, "size": 9, "line": {"color": "white", "width": 1}},
        text=[_hover(row, metric) for _, row in series.iterrows()],
        hovertemplate="%{text}<extra></extra>",
    )


def _hover(row: pd.Series, metric: str) -> str:
    std = row[f"{metric}_std"]
    noise = "one seed" if math.isnan(std) else f"± {std:.5f}, {row.seeds} seeds"
    gap = "" if math.isnan(row.gap) else f"<br>{row.gap:+.5f} to float32"
    return (
        f"<b>{row.label}</b>{f' at {row.budget}' if isinstance(row.budget, str) else ''}<br>"
        f"{METRICS[metric].title} {row[metric]:.5f} ({noise}){gap}<br>"
        f"{format_bytes(row.bytes)}, {row.share:.2%} of float32<br>"
        f"lookup of 4096 rows: {row.lookup_4096_p50:.0f} µs"
    )


def _add_front(figure: go.Figure, front: pd.DataFrame, metric: str) -> None:
    front = front.sort_values("bytes")
    figure.add_trace(
        go.Scatter(
            x=front.bytes,
            y=front[metric],
            customdata=front.share,
            name="Pareto front",
            mode="lines",
            line={"color": _FRONT, "width": 2, "shape": "hv"},
            hoverinfo="skip",
        )
    )


def _byte_axis(points: pd.DataFrame) -> dict[str, object]:
    low, high = math.log2(points.bytes.min()), math.log2(points.bytes.max())
    powers = [2**power for power in range(math.floor(low), math.ceil(high) + 1)]
    ticks = powers[:: max(1, len(powers) // 8)]
    return {
        "title": {"text": "bytes served (log scale)"},
        "type": "log",
        "tickvals": ticks,
        "ticktext": [format_bytes(tick).replace(".00", "") for tick in ticks],
    }


def _share_axis(points: pd.DataFrame) -> dict[str, object]:
    ticks = [m * 10.0**e for e in range(-6, 1) for m in (1, 2, 5) if m * 10.0**e <= 1]
    kept = [tick for tick in ticks if points.share.min() / 1.5 <= tick <= points.share.max() * 1.5]
    return {
        "title": {"text": "share of the float32 tables (log scale)"},
        "type": "log",
        "tickvals": kept,
        "ticktext": [f"{tick:.10%}".rstrip("0%").rstrip(".") + " %" if tick < 1 else "100 %" for tick in kept],
    }


def _unit_buttons(figure: go.Figure, points: pd.DataFrame) -> dict[str, object]:
    traces = [trace for trace in figure.data]
    choices = (
        ("bytes", [list(map(float, trace.x)) for trace in traces], _byte_axis(points)),
        ("% of float32", [list(map(float, trace.customdata)) for trace in traces], _share_axis(points)),
    )
    return _buttons(
        0.0,
        [
            {"label": label, "method": "update", "args": [{"x": values}, {"xaxis": axis}]}
            for label, values, axis in choices
        ],
    )


def _range_buttons(points: pd.DataFrame, metric: str) -> dict[str, object]:
    """Show everything, or what is near the front: twice its span, or some times its noise."""
    front = points[points.on_front]
    noise = float(front[f"{metric}_std"].fillna(0).max())
    low, high = float(front[metric].min()), float(front[metric].max())
    room = max(2 * (high - low), 8 * noise, 1e-4)
    near = [high - room, high + room / 4] if METRICS[metric].higher_is_better else [low + room, low - room / 4]
    return _buttons(
        0.22,
        [
            {"label": "all", "method": "relayout", "args": [{"yaxis.autorange": True}]},
            {"label": "near the front", "method": "relayout", "args": [{"yaxis.range": near}]},
        ],
    )


def _buttons(x: float, buttons: list[dict[str, object]]) -> dict[str, object]:
    return {
        "type": "buttons",
        "direction": "right",
        "x": x,
        "xanchor": "left",
        "y": 1.1,
        "showactive": True,
        "font": {"size": 12},
        "buttons": buttons,
    }
