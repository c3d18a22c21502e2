"""Plots of a record as PNG and SVG, in colours that read on light and on dark pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from .measure import OURS
from .report import FLOOR, Row, group_of, layer_rows, memory_of_layers, on_gpu
from .results import CONTENDERS, Record

# Transparent ground and middle tones: a contrast of at least 3 on white and on near-black.
INK = "#7b8490"
COLOURS = {
    "batchnorm_ext": "#e4572e",
    "batchnorm_ext_fused": "#d4882a",
    "floor": "#7b8490",
    "torch_eager": "#3b8eea",
    "torch_eager_no_cudnn": "#2aa198",
    "torch_compile": "#9b6ee0",
    "onednn": "#2f9e62",
    "apex": "#b58900",
    "inplace_abn": "#c0569b",
    "jax": "#8a8f2a",
}
MARKERS = {"forward": "o", "backward": "s", "eval": "^"}
STYLE = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "batchnorm_ext",
}
BARS_AT_MOST = 12
SHARE_AT_MOST = 150  # per cent of the floor's bandwidth; what noise put beyond is drawn at the edge
ON_TOP = 3


def draw_all(record: Record, folder: Path) -> list[Path]:
    """Draw every plot the record has data for; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    plots: dict[str, Callable[[Record], Figure | None]] = {
        "time_over_bytes": time_over_bytes,
        "speedup": speedup_bars,
        "bandwidth": bandwidth_share,
        "accuracy": accuracy_curves,
        "memory": memory_bars,
    }
    written = []
    with plt.rc_context(STYLE):
        for name, draw in plots.items():
            figure = draw(record)
            if figure is None:
                continue
            figure.suptitle(record.environment["device"], color=INK, fontsize=9)
            for kind in ("png", "svg"):
                path = folder / f"{name}.{kind}"
                metadata = {"Date": None} if kind == "svg" else None
                figure.savefig(path, dpi=150, bbox_inches="tight", metadata=metadata)
                written.append(path)
            plt.close(figure)
    return written


def _rows(record: Record, contender: str, op: str | None = None) -> list[Row]:
    return [
        row
        for row in layer_rows(record)
        if row["contender"] == contender
        and op in (None, row["op"])
        and (row["cache"] == "cold" or not on_gpu(record))
    ]


def _contenders(record: Record) -> list[str]:
    present = {row["contender"] for row in layer_rows(record)}
    return [name for name in CONTENDERS if name in present]


def _bandwidth(row: Row) -> float:
    """Bytes a second, counting the least bytes."""
    return row["bytes_min"] / (row["median_us"] * 1e-6)


def _legend(figure: Figure) -> None:
    """One legend for all panels, below them."""
    found: dict[str, Any] = {}
    for axis in figure.axes:
        found |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=6, fontsize=8)


def time_over_bytes(record: Record) -> Figure | None:
    """Time against least bytes for each op, with the roofline of the fastest measured copy."""
    ops = [op for op in MARKERS if _rows(record, OURS, op)]
    if not ops:
        return None
    figure, axes = plt.subplots(
        1, len(ops), figsize=(4.2 * len(ops), 3.8), squeeze=False, layout="constrained"
    )
    for op, axis in zip(ops, axes[0], strict=True):
        for name in _contenders(record):
            rows = _rows(record, name, op)
            axis.scatter(
                [row["bytes_min"] / 1e6 for row in rows],
                [row["median_us"] for row in rows],
                s=14,
                alpha=0.75,
                color=COLOURS[name],
                label=name,
                marker="o" if name != FLOOR else "_",
                linewidths=1,
                zorder=ON_TOP if name == OURS else None,
            )
        _roofline(record, axis, op)
        axis.set(xscale="log", yscale="log", title=op, xlabel="least bytes moved, MB")
    axes[0][0].set_ylabel("time, µs")
    _legend(figure)
    return figure


def _roofline(record: Record, axis: Axes, op: str) -> None:
    """The line of memory bandwidth, that of the fastest copy out of cache."""
    floors = _rows(record, FLOOR)
    cold = [row for row in floors if row["cache"] == "cold"] or floors
    here = [row["bytes_min"] for row in _rows(record, FLOOR, op)]
    if not here:
        return
    peak = max(_bandwidth(row) for row in cold)
    ends = [min(here), max(here)]
    axis.plot(
        [one / 1e6 for one in ends],
        [one / peak * 1e6 for one in ends],
        color=INK,
        linewidth=1,
        label=f"memory, {peak / 1e9:.0f} GB/s",
    )


def _label(row: Row) -> str:
    shape = "x".join(map(str, row["shape"]))
    layout = {"contiguous": "", "channels_last": " nhwc"}[row["layout"]]
    return f"{shape} {row['dtype'].replace('float', 'fp').replace('bfp', 'bf')}{layout}"


def _chosen(rows: Sequence[Row]) -> list[Row]:
    """Bars for ResNet-50's layers if they were measured, else a spread of what was."""
    named = [row for row in rows if group_of(row) == "resnet50"] or list(rows)
    step = max(1, -(-len(named) // BARS_AT_MOST))
    return sorted(named[::step], key=lambda row: row["bytes_min"])


def speedup_bars(record: Record) -> Figure | None:
    """Our speed-up over each peer, layer by layer."""
    ops = [op for op in MARKERS if _rows(record, OURS, op)]
    peers = [name for name in _contenders(record) if name not in (OURS, FLOOR)]
    if not ops or not peers:
        return None
    figure, axes = plt.subplots(
        1, len(ops), figsize=(4.6 * len(ops), 4.8), squeeze=False, layout="constrained"
    )
    for op, axis in zip(ops, axes[0], strict=True):
        chosen = _chosen(_rows(record, OURS, op))
        thickness = 0.8 / len(peers)
        extremes = [1.0]
        for index, peer in enumerate(peers):
            ratios = {_label(row): row for row in _rows(record, peer, op) if "ratio" in row}
            found = [
                (i, ratios[_label(row)]) for i, row in enumerate(chosen) if _label(row) in ratios
            ]
            values = [row["ratio"] for _, row in found]
            errors = [
                [row["ratio"] - row["ratio_low"] for _, row in found],
                [row["ratio_high"] - row["ratio"] for _, row in found],
            ]
            axis.barh(
                [i + (index - (len(peers) - 1) / 2) * thickness for i, _ in found],
                [value - 1 for value in values],
                left=1,
                height=thickness,
                xerr=[[max(0.0, one) for one in side] for side in errors],
                error_kw={"ecolor": INK, "elinewidth": 0.8},
                color=COLOURS[peer],
                label=peer,
            )
            extremes += values
        axis.axvline(1, color=INK, linewidth=1)
        axis.set_xscale("log")
        axis.set_xlim(min(extremes) / 1.5, 1.5 * max(extremes))
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_yticks(range(len(chosen)), [_label(row) for row in chosen], fontsize=7)
        axis.set(title=op, xlabel="times faster (right of the line: batchnorm_ext wins)")
        axis.xaxis.label.set_size(8)
    _legend(figure)
    return figure


def bandwidth_share(record: Record) -> Figure | None:
    """Achieved share of the floor's bandwidth against size, for each op."""
    ops = [op for op in MARKERS if _rows(record, OURS, op)]
    if not ops or not _rows(record, FLOOR):
        return None
    figure, axes = plt.subplots(
        1, len(ops), figsize=(4.2 * len(ops), 3.6), squeeze=False, layout="constrained"
    )
    for op, axis in zip(ops, axes[0], strict=True):
        for name in _contenders(record):
            rows = [row for row in _rows(record, name, op) if row["floor_us"]]
            if name == FLOOR or not rows:
                continue
            axis.scatter(
                [row["bytes_min"] / 1e6 for row in rows],
                [min(SHARE_AT_MOST, 100 * row["floor_us"] / row["median_us"]) for row in rows],
                s=14,
                alpha=0.75,
                color=COLOURS[name],
                label=name,
                zorder=ON_TOP if name == OURS else None,
                clip_on=False,
            )
        axis.axhline(100, color=INK, linewidth=1)
        axis.set(xscale="log", title=op, xlabel="least bytes moved, MB", ylim=(0, SHARE_AT_MOST))
    axes[0][0].set_ylabel("share of the floor's bandwidth, %")
    _legend(figure)
    return figure


def accuracy_curves(record: Record) -> Figure | None:
    """Errors of variance, output and input gradient against mean/std."""
    if not record.accuracy:
        return None
    shown = ("variance", "y", "dx")
    figure, axes = plt.subplots(
        1, len(shown), figsize=(4.2 * len(shown), 3.6), sharey=True, layout="constrained"
    )
    smallest = 1e-9
    for quantity, axis in zip(shown, axes, strict=True):
        for name in CONTENDERS:
            entries = [entry for entry in record.accuracy if entry["contender"] == name]
            points = sorted(
                (entry["mean_over_std"], entry[quantity])
                for entry in entries
                if entry.get(quantity) is not None
            )
            if points:
                x, y = zip(*points, strict=True)
                clipped = [max(one, smallest) for one in y]
                axis.plot(
                    *(x, clipped, "o-"),
                    color=COLOURS[name],
                    markersize=3,
                    label=name,
                    zorder=ON_TOP if name == OURS else None,
                )
        axis.set_xscale("symlog", linthresh=1)
        axis.set(yscale="log", title=quantity, xlabel="mean / std of the data")
    axes[0].set_ylabel("relative error against float64")
    _legend(figure)
    return figure


def _use(entry: dict[str, Any]) -> str:
    return _label(entry) + (f", {entry['mode']}" if entry["mode"] != "training" else "")


def memory_bars(record: Record) -> Figure | None:
    """Saved and peak bytes as multiples of the input."""
    memory = memory_of_layers(record)
    if not memory:
        return None
    cases = list(dict.fromkeys(_use(entry) for entry in memory))
    present = {entry["contender"] for entry in memory}
    names = [name for name in CONTENDERS if name in present]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    thickness = 0.8 / len(names)
    for quantity, axis in zip(("saved_bytes", "peak_bytes"), axes, strict=True):
        for index, name in enumerate(names):
            entries: list[dict[str, Any]] = [
                entry
                for entry in memory
                if entry["contender"] == name and entry[quantity] is not None
            ]
            axis.barh(
                [
                    cases.index(_use(entry)) + (index - (len(names) - 1) / 2) * thickness
                    for entry in entries
                ],
                [entry[quantity] / entry["input_bytes"] for entry in entries],
                height=thickness,
                color=COLOURS[name],
                label=name,
            )
        axis.set_yticks(range(len(cases)), cases, fontsize=8)
        title = {"saved_bytes": "kept for backward", "peak_bytes": "peak of a step"}[quantity]
        axis.set(title=title, xlabel="multiples of the input")
    _legend(figure)
    return figure
