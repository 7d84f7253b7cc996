"""What a benchmark found: as tables for people, as JSON, and as a picture where matplotlib is installed."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle.console import aligned, printable
from ..bundle.errors import InvalidInputError
from ..bundle.paths import replacing
from .processes import Start
from .timing import Arithmetic, Bandwidth, Row

SCHEMA_VERSION = 4
_NOTHING = "–"
_COLOURS = {"host": "#1f6fb4", "unchecked": "#1f6fb4", "device": "#2a8c55", "floor": "#b9b9b9"}
_INK = "#222222"


@dataclass(frozen=True)
class Report:
    """machine: facts by name; bundle: what was measured; missing: what could not be, with the reason."""

    machine: Mapping[str, str]
    bundle: Mapping[str, str]
    backends: Mapping[str, str]
    starts: tuple[Start, ...]
    rows: tuple[Row, ...]
    bandwidths: tuple[Bandwidth, ...]
    arithmetic: tuple[Arithmetic, ...]
    missing: Mapping[str, str]
    remarks: tuple[str, ...]


def report_json(report: Report) -> str:
    return json.dumps({"schema_version": SCHEMA_VERSION, **dataclasses.asdict(report)}, indent=1, ensure_ascii=False)


# --- text -------------------------------------------------------------------------------------------------------------


def report_text(report: Report, *, is_summary: bool = False) -> str:
    """Every figure, in aligned tables.

    is_summary: what fits a screen, which a caller sees of encoding and of decoding all layers.
    """
    lines = _summary(report) if is_summary else _lines(report)
    return "\n".join(map(printable, lines)) + "\n"


def _summary(report: Report) -> Iterator[str]:
    yield f"{report.bundle['bundle']} on {report.machine.get('CPU', 'this machine')}, microseconds"
    shown = [row for row in report.rows if row.path == "host" and row.operation in ("encode", "decode")]
    yield from _table(_SUMMARY_COLUMNS, shown)
    if report.missing:
        yield f"not measured: {', '.join(report.missing)}"
    yield "-v shows every figure, and why something was not measured"


def _lines(report: Report) -> Iterator[str]:
    for facts in (report.bundle, report.machine, report.backends):
        width = max(map(len, facts), default=0)
        yield from (f"{name:{width}}  {value}" for name, value in facts.items())
        yield ""
    yield from (f"not measured: {line}" for line in missing_lines(report.missing))
    if report.missing:
        yield ""
    if report.starts:
        yield f"cold start, medians of {report.starts[0].processes} new processes, files in the system's cache"
        yield from _table(_START_COLUMNS, list(map(_in_megabytes, report.starts)))
        yield ""
    for batch in dict.fromkeys(row.batch for row in report.rows):
        rows = [row for row in report.rows if row.batch == batch]
        yield f"{batch} {'chunk' if batch == 1 else 'chunks'} a call, microseconds, figures taken in turns"
        yield from _table(_ROW_COLUMNS, rows)
        found = [entry for entry in report.bandwidths if entry.batch == batch]
        if found:
            listed = ", ".join(f"{entry.way} {entry.bytes_per_second / 1e9:.1f} GB/s" for entry in found)
            yield f"copy bandwidth measured in the same rounds: {listed}"
        for rate in (entry for entry in report.arithmetic if entry.batch == batch):
            yield f"fp32 rate measured in the same rounds: {rate.operations_per_second / 1e12:.1f} TFLOP/s"
        yield ""
    yield from (f"- {remark}" for remark in (*_legend(report.rows), *report.remarks))


def missing_lines(missing: Mapping[str, str]) -> Iterator[str]:
    """What could not be measured, and why: a line for each reason."""
    names: dict[str, list[str]] = {}
    for name, reason in missing.items():
        names.setdefault(" ".join(reason.split()), []).append(name)
    yield from (f"{', '.join(found)}: {reason}" for reason, found in names.items())


#: What a way of calling is.
_PATHS = {
    "host": "host: arrays of the processor in and out, checked by the tokenizer (torch checks nothing); copies to a "
    "GPU and back are part of it",
    "unchecked": "unchecked: the backend alone, without the tokenizer's checks",
    "device": "device: arrays that lie on the GPU; launch of the captured graph and synchronisation",
}
#: What a number of a row is, where there is one.
_NUMBERS = {
    "p50": "jitter: p99 - p50; a percentile that so few calls cannot tell is left out",
    "times_floor": "x floor: p50 over the floor's: of device calls a captured graph with one trivial kernel, of host "
    "calls a captured graph with their copies alone; a kernel that writes into pinned memory saves the copy back and "
    "can be below",
    "times_decode": "x decode: p50 over that of `decode`, by the same path",
    "times_beside": "x beside: p50 over that of the bundle beside, in the same call of the same backend",
    "bandwidth_share": "bandwidth: the time that a call's bytes alone need at the measured bandwidth, over p50; above "
    "100 % the arrays stay in the GPU's cache",
    "roofline_share": "roofline: the same for the bytes or the operations in float32, whichever take longer",
}


def _legend(rows: Sequence[Row]) -> Iterator[str]:
    paths = {row.path for row in rows}
    yield from (text for path, text in _PATHS.items() if path in paths)
    yield from (text for name, text in _NUMBERS.items() if any(getattr(row, name) is not None for row in rows))


#: Columns by their head: an attribute of each entry, and how it is written.
_ROW_COLUMNS = {
    "backend": "backend",
    "call": "operation",
    "path": "path",
    "calls": "calls:,",
    "p50": "p50:,.1f",
    "p90": "p90:,.1f",
    "p99": "p99:,.1f",
    "p99.9": "p999:,.1f",
    "max": "max:,.1f",
    "jitter": "jitter:,.1f",
    "x floor": "times_floor:.2f",
    "x beside": "times_beside:.2f",
    "x decode": "times_decode:.2f",
    "steps/s": "steps_per_second:,.0f",
    "bandwidth": "bandwidth_share:.1%",
    "roofline": "roofline_share:.1%",
}
_SUMMARY_COLUMNS = {"backend": "backend", "call": "operation", "chunks": "batch:,"} | {
    head: _ROW_COLUMNS[head] for head in ("p50", "p99", "x beside", "steps/s")
}
_START_COLUMNS = {
    "backend": "backend",
    "first result s": "first_result:.3f",
    "import numpy": "import_numpy:.3f",
    "import runtime": "import_runtime:.3f",
    "load": "load:.3f",
    "load, hashed alone": "load_hashed:.3f",
    "first decode": "first_decode:.4f",
    "host MB": "host_memory:,",
    "GPU MB": "gpu_memory:,",
}


def _table(columns: Mapping[str, str], entries: Sequence[object]) -> Iterator[str]:
    """A column that has nothing to say is left out."""
    cells = {head: [_cell(shape, entry) for entry in entries] for head, shape in columns.items()}
    cells = {head: shown for head, shown in cells.items() if set(shown) != {_NOTHING}}
    num_texts = sum(":" not in columns[head] for head in cells)
    return aligned([tuple(cells), *zip(*cells.values(), strict=True)], left=num_texts, is_ruled=True)


def _cell(shape: str, entry: object) -> str:
    name, _, form = shape.partition(":")
    value = getattr(entry, name)
    return _NOTHING if value is None else format(value, form)


def _in_megabytes(start: Start) -> Start:
    host, gpu = (None if size is None else round(size / 1e6) for size in (start.host_memory, start.gpu_memory))
    return dataclasses.replace(start, host_memory=host, gpu_memory=gpu)


# --- files ------------------------------------------------------------------------------------------------------------


def report_files(folder: Path) -> tuple[Path, ...]:
    """What write_report may write."""
    return tuple(folder / f"bench.{suffix}" for suffix in ("json", "txt", "png"))


def write_report(report: Report, folder: Path) -> list[str]:
    """bench.json, bench.txt and, where matplotlib is installed, bench.png; all or none.

    Returns what there is to say. Raises InvalidInputError where one cannot be written.
    """
    texts = {"bench.json": report_json(report), "bench.txt": report_text(report)}
    # A name of a file need not be UTF-8; escaped like this, it is JSON too.
    contents = {name: text.encode("utf-8", "backslashreplace") for name, text in texts.items()}
    said = []
    try:
        contents["bench.png"] = report_png(report)
    except ImportError as error:
        said.append(f"no bench.png: {error}; install it with: pip install matplotlib")
    with contextlib.ExitStack() as stack:
        for name, content in contents.items():
            stack.enter_context(replacing(folder / name, error=InvalidInputError)).write_bytes(content)
    return said + [f"wrote {folder / name}" for name in contents]


def report_png(report: Report) -> bytes:
    """Bars of p50 with whiskers to p99, a panel for each batch; `unchecked` is left out.

    Raises ImportError without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    batches = list(dict.fromkeys(row.batch for row in report.rows))
    panels = [_drawn(row for row in report.rows if row.batch == batch) for batch in batches]
    heights = [len(rows) + 4 for rows in panels]
    figure = Figure(figsize=(10, 0.22 * sum(heights) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(panels), squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, batch, rows in zip(all_axes, batches, panels, strict=True):
        _draw(axes, rows)
        axes.set_title(f"{batch} {'chunk' if batch == 1 else 'chunks'} a call", loc="left", fontsize=10)
        axes.set_xlabel("microseconds: p50, whisker to p99", fontsize=9)
    figure.suptitle(" · ".join(report.machine[name] for name in ("CPU", "GPU") if name in report.machine), fontsize=10)
    output = io.BytesIO()
    figure.savefig(output, format="png", dpi=130)
    return output.getvalue()


def _drawn(rows: Iterable[Row]) -> list[Row]:
    """Floors first, then call by call, so that backends stand beside each other."""
    kept = [row for row in rows if row.path != "unchecked"]
    operations = list(dict.fromkeys(row.operation for row in kept))
    return sorted(kept, key=lambda row: (row.path != "floor", operations.index(row.operation), row.path))


def _draw(axes: Any, rows: Sequence[Row]) -> None:
    labels = [" · ".join((row.operation, row.backend, row.path)).removesuffix(" · floor") for row in rows]
    values = [row.p50 for row in rows]
    above = [(row.max if row.p99 is None else row.p99) - row.p50 for row in rows]
    places = range(len(rows))
    colours = [_COLOURS[row.path] for row in rows]
    whiskers = {"ecolor": _INK, "elinewidth": 0.8, "capsize": 2}
    axes.barh(places, values, xerr=[[0] * len(rows), above], color=colours, height=0.7, error_kw=whiskers)
    axes.margins(y=0.01)
    axes.set_xscale("log")
    # Bars on a logarithmic axis have no natural end: half of the shortest.
    axes.set_xlim(left=min(values) / 2)
    axes.set_yticks(places, labels, fontsize=8)
    axes.invert_yaxis()
    floors = {row.floor for row in rows if row.path == "device" and row.floor}
    for row in rows:
        if row.path == "floor" and row.operation in floors:
            axes.axvline(row.p50, color=_INK, linestyle="--", linewidth=0.9)
    for place, row in enumerate(rows):
        axes.annotate(
            f"{row.p50:,.1f}",
            (row.p50, place),
            (-3, 0),
            textcoords="offset points",
            fontsize=7,
            color="white" if row.path != "floor" else _INK,
            ha="right",
            va="center",
        )
    axes.grid(axis="x", which="major", color="#e3e3e3", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
