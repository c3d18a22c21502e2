"""Reports in markdown: summary and tables of one record, comparison of two."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .contenders import MINIMUM_TRAFFIC
from .measure import OURS
from .results import CONTENDERS, IDENTITY, Record
from .shapes import DTYPES, LAYOUTS
from .stats import Ratio, geometric_mean

Row = dict[str, Any]

# Spread between the deciles of the middle measurement above which a run decides little.
NOISY_RUN = 0.30
# Interval of a ratio, relative to the ratio, above which that one comparison is undecided.
UNDECIDED = 0.5
SLOWER = "▼"
STUDIES = ("sweep", "scaling", "tiny", "model")
FLOOR = "floor"
SLOWER_ON_TERMINAL = 10


def group_of(row: Row) -> str:
    """The set a row's case belongs to."""
    return row["case"].split("/")[0]


def describe(row: Row) -> str:
    """A row's case in words."""
    shape = "x".join(map(str, row["shape"]))
    return f"{row['case']} {shape} {row['dtype']} {row['layout']} {row['op']} {row['cache']}"


def our_ratio(row: Row) -> Ratio:
    """Our time over that of the row's contender."""
    return Ratio(1 / row["ratio"], 1 / row["ratio_high"], 1 / row["ratio_low"])


def speedup(row: Row) -> Ratio:
    """The contender's time over ours."""
    return Ratio(row["ratio"], row["ratio_low"], row["ratio_high"])


def on_gpu(record: Record) -> bool:
    """Whether a GPU was measured; then each case has a row for the cold and for the hot cache."""
    return bool(record.environment["driver"])


def layer_rows(record: Record) -> list[Row]:
    """Timings of layers at the run's number of threads; studies have tables of their own."""
    threads = record.environment["threads"]
    return [
        row
        for row in record.rows
        if group_of(row) not in STUDIES and row.get("threads", threads) == threads
    ]


def ratios_of_ours(record: Record, op: str, contender: str) -> list[tuple[str, Ratio]]:
    """Our time over a contender's for every case of an op, with the case's description.

    On a GPU with a cold cache, which is how a network meets its layers.
    """
    threads = record.environment["threads"]
    return [
        (describe(row), our_ratio(row))
        for row in record.rows
        if row["op"] == op
        and row["contender"] == contender
        and "ratio" in row
        and group_of(row) not in ("sweep", "scaling")
        and (row["cache"] == "cold" or not on_gpu(record))
        and row.get("threads", threads) == threads
    ]


def render(record: Record, tables: bool = True) -> str:
    """The report; without `tables` only what fits a terminal."""
    shown = None if tables else SLOWER_ON_TERMINAL
    parts = [_header(record), _summary(record), _slower(record, shown)]
    if tables:
        parts += [_by_kind(record), _networks(record), _layers(record)]
    parts += [_overhead(record), _model(record), _scaling(record)]
    if tables:
        parts.append(_sweep(record))
    parts += [_memory(record), _accuracy(record), _left_out(record)]
    parts += ["\n".join(f"> Noise: {warning}." for warning in noise_warnings(record))]
    return "\n\n".join(part for part in parts if part)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A markdown table whose columns line up in a terminal too."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    # Numbers stand right: a column is one where its first cell begins with a digit.
    right = [len(cells) > 1 and cells[1][i][:1].isdigit() for i in range(len(header))]

    def line(values: Sequence[str]) -> str:
        aligned = (
            value.rjust(width) if flush else value.ljust(width)
            for value, width, flush in zip(values, widths, right, strict=True)
        )
        return f"| {' | '.join(aligned)} |"

    rule = (
        "-" * (width - 1) + (":" if flush else "-")
        for width, flush in zip(widths, right, strict=True)
    )
    return "\n".join([line(cells[0]), f"| {' | '.join(rule)} |", *map(line, cells[1:])])


def _section(title: str, *body: str) -> str:
    return "\n\n".join([f"## {title}", *body]) if any(body) else ""


def _header(record: Record) -> str:
    environment = record.environment
    build = environment["build"]
    lines = [
        f"# Batch norm on {environment['device']}",
        f"{environment['date'][:10]}, commit {environment['commit']}, "
        f"torch {environment['torch']}, Python {environment['python']}, "
        + (
            f"CUDA {environment['cuda']}, driver {environment['driver']}, "
            * bool(environment["driver"])
        )
        + f"batchnorm_ext backend: {environment['backend']}"
        + (f" ({build['instruction_set']})" if build.get("instruction_set") else "")
        + ".",
    ]
    if environment["backend"] == "torch":
        lines.append(
            "**These are figures of the pure-PyTorch fallback, not of the native kernels.**"
        )
    return "\n\n".join(lines)


def _present(rows: Sequence[Row]) -> list[str]:
    """Peers among the rows, in the order of `CONTENDERS`."""
    names = {row["contender"] for row in rows}
    return [name for name in CONTENDERS if name in names and name not in (OURS, FLOOR)]


def _mean(rows: Iterable[Row], of: Callable[[Row], Ratio]) -> str:
    ratios = [of(row) for row in rows if "ratio" in row]
    return f"{geometric_mean(ratios)}" if ratios else "-"


def _of(rows: Iterable[Row], contender: str) -> list[Row]:
    return [row for row in rows if row["contender"] == contender]


def _grouped(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys)].append(row)
    return groups


def _reading_order(group: tuple[tuple[Any, ...], list[Row]]) -> tuple[Any, ...]:
    """Ops in the order of a training step, dtypes and layouts as the sets list them."""
    order = [*MINIMUM_TRAFFIC, *DTYPES, *LAYOUTS]
    return tuple(order.index(value) if value in order else value for value in group[0])


def _mean_table(rows: Sequence[Row], *keys: str) -> str:
    """Geometric means for each value of some keys: times the floor, and speed-up over each peer."""
    peers = _present(rows)
    lines = []
    for values, members in sorted(_grouped(rows, *keys).items(), key=_reading_order):
        line = [*values, len(_of(members, OURS)), _mean(_of(members, FLOOR), our_ratio)]
        lines.append([*line, *(_mean(_of(members, peer), speedup) for peer in peers)])
    return table([*keys, "cases", "times the floor", *(f"faster than {p}" for p in peers)], lines)


def _summary(record: Record) -> str:
    rows = layer_rows(record)
    if not rows:
        return ""
    keys = ("op", "cache") if on_gpu(record) else ("op",)
    note = (
        "Geometric means with 95 % intervals. The floor is a copy (forward, eval) or a sum "
        "(backward) by torch that moves the least bytes, or a sum and two copies "
        "(act_forward_backward: relu(batch_norm(x) + residual) and its gradients)."
    )
    return _section("Summary", note, _mean_table(rows, *keys))


def _slower(record: Record, shown: int | None) -> str:
    """The cases in which a peer is faster, worst first, undecided ones marked."""
    slower = [
        row
        for row in layer_rows(record)
        if row["contender"] not in (OURS, FLOOR) and row.get("ratio", 1) < 1
    ]
    compared = [row for row in layer_rows(record) if row["contender"] not in (OURS, FLOOR)]
    if not compared:
        return ""
    if not slower:
        return _section("Where a peer is faster", f"In none of {len(compared)} comparisons.")
    lines = [
        [
            describe(row),
            row["contender"],
            f"{our_ratio(row)}",
            "undecided" if row["ratio_high"] >= 1 else SLOWER,
        ]
        for row in sorted(slower, key=lambda row: row["ratio"])[:shown]
    ]
    head = f"In {len(slower)} of {len(compared)} comparisons"
    head += "." if len(lines) == len(slower) else f", the worst {len(lines)} of them:"
    return _section(
        "Where a peer is faster", head, table(["case", "peer", "our time over its", ""], lines)
    )


def _by_kind(record: Record) -> str:
    rows = layer_rows(record)
    return (
        _section("By dtype and layout", _mean_table(rows, "op", "dtype", "layout")) if rows else ""
    )


def _networks(record: Record) -> str:
    """All batch norms of a network added up, where every layer was measured."""
    lines = []
    keys = ("op", "dtype", "layout", "cache")
    members = [row for row in layer_rows(record) if group_of(row) in ("resnet50", "mobilenetv2")]
    wanted = {"resnet50": 53, "mobilenetv2": 52}
    batches: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in members:
        batches[(group_of(row), row["shape"][0], *(row[key] for key in keys))].append(row)
    for (network, batch, *values), rows in sorted(batches.items()):
        ours = _of(rows, OURS)
        if sum(row.get("count", 1) for row in ours) != wanted[network]:
            continue
        total = {
            name: sum(row["median_us"] * row.get("count", 1) for row in _of(rows, name))
            for name in [OURS, FLOOR, *_present(rows)]
            if len(_of(rows, name)) == len(ours)
        }
        times = ", ".join(f"{name} {time / 1e3:.2f}" for name, time in total.items())
        lines.append([network, batch, *values, times])
    if not lines:
        return ""
    return _section(
        "All batch norms of a network, ms", table(["network", "batch", *keys, "total"], lines)
    )


def _layers(record: Record) -> str:
    rows = layer_rows(record)
    return _section("Layers", _case_table(rows)) if rows else ""


def _case_order(found: dict[str, Row]) -> tuple[Any, ...]:
    """Sets by name, sizes from small to large, the ops of a case together."""
    row = next(iter(found.values()))
    orders = ((LAYOUTS, "layout"), (DTYPES, "dtype"), (MINIMUM_TRAFFIC, "op"))
    return (
        *(group_of(row), row["shape"][2:], row["shape"], row["case"]),
        *([*names].index(row[key]) for names, key in orders if row[key] in names),
        row["cache"],
    )


def _case_table(rows: Sequence[Row]) -> str:
    peers = _present(rows)
    cases: dict[tuple[Any, ...], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        key = tuple(str(row.get(name)) for name in IDENTITY if name != "contender")
        cases[key][row["contender"]] = row
    lines = []
    for found in sorted(cases.values(), key=_case_order):
        if OURS not in found:
            continue
        ours, floor = found[OURS], found.get(FLOOR)
        gigabytes = ours["bytes_min"] / ours["median_us"] / 1e3
        line = [
            ours["case"],
            "x".join(map(str, ours["shape"])),
            ours["dtype"],
            ours["layout"],
            ours["op"],
            ours["cache"],
            f"{ours['median_us']:.1f}",
            f"{gigabytes:.1f}",
            f"{our_ratio(floor).value:.2f}" if floor else "-",
        ]
        lines.append([*line, *(_cell(found.get(peer)) for peer in peers)])
    header = ["case", "shape", "dtype", "layout", "op", "cache"]
    return table([*header, "µs", "GB/s", "x floor", *peers], lines)


def _cell(row: Row | None) -> str:
    """A peer's time over ours; marked where it is the faster one."""
    if row is None or "ratio" not in row:
        return "-"
    return f"{row['ratio']:.2f}x{f' {SLOWER}' if row['ratio'] < 1 else ''}"


def _study(record: Record, group: str) -> list[Row]:
    return [row for row in record.rows if group_of(row) == group]


def _overhead(record: Record) -> str:
    rows = _study(record, "tiny")
    return _section("Module calls on tiny tensors", _case_table(rows)) if rows else ""


def _model(record: Record) -> str:
    rows = _study(record, "model")
    note = (
        "The floor is the same network with no batch norm at all. Kept for backward are the distinct "
        "tensors, parameters aside; the peak is what a step holds beside what it began with."
    )
    lines = [
        [
            "x".join(map(str, entry["shape"])),
            entry["dtype"],
            entry["layout"],
            entry["contender"],
            f"{entry['saved_bytes'] / 1e6:.0f}",
            f"{entry['peak_bytes'] / 1e6:.0f}" if entry["peak_bytes"] else "-",
        ]
        for entry in record.memory
        if group_of(entry) == "model"
    ]
    header = ["shape", "dtype", "layout", "contender", "kept for backward, MB", "peak, MB"]
    memory = table(header, lines) if lines else ""
    return _section("Training step of ResNet-50", note, _case_table(rows), memory) if rows else ""


def _scaling(record: Record) -> str:
    """What more threads gain, and whether the time is linear in the batch."""
    rows = _of(_study(record, "scaling"), OURS)
    threads = sorted({row["threads"] for row in rows})
    gains, batches = [], []
    for (case, op, *rest), members in _grouped(rows, "case", "op", "dtype", "layout").items():
        if case == "scaling/batch":
            batches += [
                [row["shape"][0], f"{row['median_us'] / row['shape'][0]:.1f}"] for row in members
            ]
            continue
        times = {row["threads"]: row["median_us"] for row in members}
        shape = "x".join(map(str, members[0]["shape"]))
        cells = [f"{times[n]:.0f} ({times[1] / times[n]:.2f}x)" for n in threads if n in times]
        if len(cells) == len(threads):
            gains.append([shape, *rest, op, *cells])
    head = ["shape", "dtype", "layout", "op", *(f"µs, {n} threads" for n in threads)]
    return "\n\n".join(
        part
        for part in (
            _section("Threads", table(head, gains)) if gains else "",
            _section("Time over the batch", table(["batch", "µs for each image"], batches))
            if batches
            else "",
        )
        if part
    )


def _sweep(record: Record) -> str:
    rows = _study(record, "sweep")
    return _section("Sweep over N, C and HW", _case_table(rows)) if rows else ""


def memory_of_layers(record: Record) -> list[dict[str, Any]]:
    """Memory of single layers; networks have a table of their own."""
    return [entry for entry in record.memory if group_of(entry) != "model"]


def _memory(record: Record) -> str:
    lines = [
        [
            "x".join(map(str, entry["shape"])),
            entry["dtype"],
            entry["layout"],
            entry["mode"],
            entry["contender"],
            f"{entry['input_bytes'] / 1e6:.1f}",
            f"{entry['saved_bytes'] / entry['input_bytes']:.2f}",
            f"{entry['peak_bytes'] / entry['input_bytes']:.2f}" if entry["peak_bytes"] else "-",
        ]
        for entry in memory_of_layers(record)
    ]
    header = [
        "shape",
        "dtype",
        "layout",
        "use",
        "contender",
        "input MB",
        "saved / input",
        "peak / input",
    ]
    note = (
        "Kept for backward, parameters aside, and the most that a forward and backward pass holds "
        "beside x and dy."
    )
    return _section("Memory", note, table(header, lines)) if lines else ""


def _accuracy(record: Record) -> str:
    columns = ("mean", "variance", "y", "dx", "dweight", "dbias")
    lines = [
        [
            f"{entry['mean_over_std']:g}",
            entry["contender"],
            *("-" if entry.get(name) is None else f"{entry[name]:.1e}" for name in columns),
        ]
        for entry in sorted(record.accuracy, key=lambda entry: entry["mean_over_std"])
    ]
    note = "Relative errors against float64, fp32 data; a dash is a result that is not finite."
    header = ["mean/std", "contender", *columns]
    return _section("Accuracy", note, table(header, lines)) if lines else ""


def _left_out(record: Record) -> str:
    lines = [f"* {entry['contender']}: {entry['reason']}" for entry in record.missing]
    lines += [
        f"* {entry['contender']}, {entry['case']} {entry['op']}: {entry['reason']}"
        for entry in record.excluded
    ]
    return _section("Absent or wrong", "\n".join(lines)) if lines else ""


def noise_warnings(record: Record) -> list[str]:
    """What a reader must not conclude from this run."""
    spreads = sorted((row["p90_us"] - row["p10_us"]) / row["median_us"] for row in record.rows)
    if not spreads:
        return []
    warnings = []
    middle = spreads[len(spreads) // 2]
    if middle > NOISY_RUN:
        warnings.append(
            f"outer deciles of a typical measurement lie {middle:.0%} of its median apart; "
            "the machine was busy, repeat on a quiet one"
        )
    compared = [row for row in record.rows if "ratio" in row]
    wide = [row for row in compared if speedup(row).relative_width > UNDECIDED]
    if wide:
        warnings.append(
            f"{len(wide)} of {len(compared)} ratios have an interval wider than {UNDECIDED:.0%}"
        )
    return warnings


def render_comparison(before: Record, after: Record) -> str:
    """Our times in two records, case by case; changes beyond both spreads are marked."""
    old = {_key(row): row for row in _of(before.rows, OURS)}
    lines, ratios = [], []
    for row in _of(after.rows, OURS):
        earlier = old.get(_key(row))
        if earlier is None:
            continue
        ratio = Ratio(
            row["median_us"] / earlier["median_us"],
            row["p10_us"] / earlier["p90_us"],
            row["p90_us"] / earlier["p10_us"],
        )
        ratios.append(ratio)
        verdict = "slower" if ratio.low > 1 else "faster" if ratio.high < 1 else ""
        lines.append(
            [
                describe(row),
                f"{earlier['median_us']:.1f}",
                f"{row['median_us']:.1f}",
                f"{ratio.value:.2f}",
                verdict,
            ]
        )
    names = [f"{record.environment['commit']}" for record in (before, after)]
    title = f"# {names[0]} to {names[1]}, {after.environment['device']}"
    if not lines:
        return f"{title}\n\nThe two files have no case in common."
    lines.sort(key=lambda line: -float(line[3]))
    counts = {word: sum(line[4] == word for line in lines) for word in ("slower", "faster")}
    text = (
        f"{len(lines)} cases in common: {counts['slower']} slower, {counts['faster']} faster, "
        f"new time over old {geometric_mean(ratios).value:.2f} on geometric mean. "
        "A case is called slower or faster where the deciles of both runs do not overlap."
    )
    if before.environment["device"] != after.environment["device"]:
        text += f" The first file is from another device: {before.environment['device']}."
    return "\n\n".join([title, text, table(["case", "µs before", "µs after", "ratio", ""], lines)])


def _key(row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(name)) for name in IDENTITY if name not in ("device", "contender"))
