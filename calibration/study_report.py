"""The calibration study for people: tables as text and as Markdown, a picture, and the files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from rfsq.calibration.errors import CalibrationError
from rfsq.calibration.recovered import COARSE_LAYERS
from rfsq.calibration.study_result import EpisodesRow, LayerRow, Spread, Spreads, StudyResult, result_to_json
from rfsq.runtime.bundle.writing import replacing

RESULT_JSON = "calibration.json"
RESULT_PNG = "calibration.png"
_NONE = "–"


@dataclass(frozen=True)
class _Table:
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def titles(result: StudyResult) -> dict[str, str]:
    """What each part of `markdown` shows, by the same names: a sentence for a caption, plain text."""
    coarse, count = _prefix_name(_coarse(result), result), len(result.checkpoints)
    over = f"over {count} checkpoints" if count > 1 else "of one checkpoint"
    return {
        "defaults": "What calibration does unless it is told otherwise",
        "settings": (
            "Settings, each with one choice other than the default: errors on the test episodes by the layers decoded "
            f"({coarse}: these alone; all: every layer), MSE in robot units², what quantising adds to the squared "
            "error of actions drawn evenly from the recorded ranges, and the bound on the latent error; mean ± "
            f"standard deviation {over}, of the bound the highest"
        ),
        "readout": (
            "Readouts by their ridge, without a quantiser: action MSE in robot units² on calibration episodes left out "
            f"of the fit and on the test episodes, mean ± standard deviation {over}; then action MSE as a multiple of "
            "that of the decoder as trained, below 1x the readout helps"
        ),
        "episodes": (
            "Number of calibration episodes: action MSE in robot units² on the test episodes, mean (lowest … highest) "
            f"over random choices of episodes and {over}"
        ),
        "tasks": (
            "Fitted to these tasks, tested on one: action MSE as a multiple of that of the unquantised autoencoder "
            f"with the setting's own readout, mean over tasks and {over}"
        ),
        "layers": (
            "Layers: what each one brings in the default setting, decoded with all before it. It pays on the data "
            "where it lowers the action MSE by 5 % or more, in the worst case where it halves the bound on the latent "
            "error of any latent in [-1, 1]"
        ),
    }


def markdown(result: StudyResult) -> dict[str, str]:
    """The defaults in a line, and tables by name: settings, readout, episodes, tasks, layers; `titles` has their
    captions. In place of a table that could not be measured stands the reason.
    """
    found = {"defaults": _defaults(result)}
    for name, table in _tables(result).items():
        found[name] = _markdown_table(table) if table else f"Not measured: {result.omitted[name]}."
    return found


def format_study(result: StudyResult) -> str:
    """All tables as text, with what they are about."""
    count = len(result.checkpoints)
    parts = [
        f"{count} checkpoint{'s' if count > 1 else ''}, fitted on {result.calibration_episodes} episodes "
        f"({result.calibration_steps} steps), judged on {result.test_episodes} others ({result.test_steps} steps) of "
        f"{result.source}; MSE in robot units²\n{_defaults(result)}\n"
        f"autoencoder as trained, no quantiser, action MSE  {_both(result.unquantised)}\n"
        f"readout refitted, no quantiser                    {_both(result.unquantised_readout)}"
    ]
    captions = titles(result)
    for name, table in _tables(result).items():
        if table is None:
            parts.append(f"{name}: not measured: {result.omitted[name]}")
            continue
        widths = [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in (table.header, *table.rows)
        )
        parts.append("\n".join((captions[name], *lines)))
    return "\n\n".join(parts)


def study_files(folder: Path) -> tuple[Path, ...]:
    """What write_study writes."""
    return folder / RESULT_JSON, folder / RESULT_PNG


def write_study(result: StudyResult, folder: Path) -> None:
    """calibration.json and calibration.png into a folder, made if missing. CalibrationError if it cannot be written."""
    try:
        with replacing(folder / RESULT_PNG) as path:
            # Without the version matplotlib would write, equal results are equal files.
            draw_study(result).savefig(path, format="png", metadata={"Software": None})
        with replacing(folder / RESULT_JSON) as path:
            path.write_text(result_to_json(result), encoding="utf-8")
    except OSError as error:
        raise CalibrationError(
            f"cannot write the study to {folder}: {error.strerror}; choose a writable --output"
        ) from error


# Tables --------------------------------------------------------------------------------------------------------------


def _tables(result: StudyResult) -> dict[str, _Table | None]:
    return {
        "settings": _settings_table(result),
        "readout": _readout_table(result),
        "episodes": _episodes_table(result) if result.episodes else None,
        "tasks": _tasks_table(result) if result.tasks else None,
        "layers": _layers_table(result),
    }


def _defaults(result: StudyResult) -> str:
    return "The defaults: " + ", ".join(f"{_words(name)} `{value}`" for name, value in result.default.items()) + "."


def _words(name: str) -> str:
    return name.replace("_", " ")


def _markdown_table(table: _Table) -> str:
    lines = [table.header, ("---",) * len(table.header), *table.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _settings_table(result: StudyResult) -> _Table:
    coarse, coarse_name = _coarse(result), _prefix_name(_coarse(result), result)
    prefixes = sorted({1, min(2, coarse), coarse, len(result.layers)})
    header = (
        "setting",
        *(f"action MSE, {_prefix_name(prefix, result)}" for prefix in prefixes),
        f"largest action error, {coarse_name}",
        f"added MSE on random actions, {coarse_name}",
        "added MSE on random actions, all",
        "bound on the latent error, all",
    )
    rows = (
        (
            row.setting,
            *(_both(row.action_mse[prefix - 1]) for prefix in prefixes),
            _number(row.max_error[coarse - 1].mean),
            _number(row.random[coarse - 1].mean),
            _number(row.random[-1].mean),
            _number(row.worst_case[-1].high),
        )
        for row in result.settings
    )
    return _Table(header, tuple(rows))


def _readout_table(result: StudyResult) -> _Table:
    header = (
        "ridge",
        "cross-validated action MSE",
        "test action MSE",
        *(
            f"{what}, over decoder as trained"
            for what in ("random actions", "unseen task", "fitted to another task alone")
        ),
    )
    rows = (
        (
            "readout off" if row.ridge is None else f"{row.ridge:.0e}".replace("e-0", "e-"),
            _NONE if row.cross_validated is None else _both(row.cross_validated),
            _both(row.test),
            _worst(row.random),
            _NONE if row.unseen is None else _worst(row.unseen),
            _NONE if row.other is None else _worst(row.other),
        )
        for row in result.readout
    )
    return _Table(header, tuple(rows))


def _episodes_table(result: StudyResult) -> _Table:
    coarse = _coarse(result)
    rows = {(row.setting, row.num_episodes): row for row in result.episodes}
    settings, counts = _names(result.episodes), sorted({count for _, count in rows})
    columns = [(setting, coarse) for setting in settings[:-1]]
    columns += [(setting, len(result.layers)) for setting in (settings[0], settings[-1])]
    header = ("episodes", *(f"action MSE, {setting}, {_prefix_name(prefix, result)}" for setting, prefix in columns))
    cells = (
        (str(count), *(_range(rows[setting, count].action_mse[prefix - 1]) for setting, prefix in columns))
        for count in counts
    )
    return _Table(header, tuple(cells))


def _tasks_table(result: StudyResult) -> _Table:
    kinds = ("fitted to every task", "to all but the tested", "to another task alone")
    prefixes = (_coarse(result), len(result.layers))
    header = ("setting", *(f"{kind}, {_prefix_name(prefix, result)}" for prefix in prefixes for kind in kinds))
    rows = (
        (
            row.setting,
            *(_worst(found[prefix - 1]) for prefix in prefixes for found in (row.seen, row.unseen, row.other)),
        )
        for row in result.tasks
    )
    return _Table(header, tuple(rows))


def _layers_table(result: StudyResult) -> _Table:
    default, trained = result.settings[0], result.settings[-1]
    header = (
        "up to layer",
        "bits per step",
        "action MSE",
        "action MSE falls by a factor of",
        f"action MSE, {trained.setting}",
        "bound on the latent error",
        "bound falls by a factor of",
        "levels used in the test episodes",
        "pays on",
    )
    rows = (
        (
            f"L{row.layer}",
            f"{row.bits:.0f}",
            _both(default.action_mse[row.layer]),
            _times(row.gain),
            _both(trained.action_mse[row.layer]),
            _number(default.worst_case[row.layer].high),
            _times(row.worst_case_gain),
            f"{row.levels_used.mean:.0%}",
            _pays(row),
        )
        for row in result.layers
    )
    return _Table(header, tuple(rows))


def _pays(row: LayerRow) -> str:
    where = (("data", row.pays_on_data), ("worst case", row.pays_in_worst_case))
    return ", ".join(name for name, pays in where if pays) or "neither"


def _names(rows: Sequence[EpisodesRow]) -> list[str]:
    """Of the settings, in their order: the default first, the decoder as it was trained last."""
    return list(dict.fromkeys(row.setting for row in rows))


def _coarse(result: StudyResult) -> int:
    return min(COARSE_LAYERS, len(result.layers))


def _prefix_name(prefix: int, result: StudyResult) -> str:
    return "all" if prefix == len(result.layers) else "L0" if prefix == 1 else f"L0-L{prefix - 1}"


def _number(value: float) -> str:
    """Three digits; 1.53e-5 rather than 1.53e-05."""
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.3g}"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{digits}e{int(exponent)}"


def _both(value: Spread) -> str:
    """Mean and deviation."""
    return _number(value.mean) + ("" if value.deviation is None else f" ± {_number(value.deviation)}")


def _times(value: Spread | None) -> str:
    if value is None:
        return _NONE
    return f"{value.mean:.2f}x" + ("" if value.deviation is None else f" ± {value.deviation:.2f}")


def _range(value: Spread) -> str:
    return f"{_number(value.mean)} ({_number(value.low)} … {_number(value.high)})"


def _worst(value: Spread) -> str:
    """Mean and highest of ratios."""
    return f"{value.mean:.2f}x (worst {value.high:.2f}x)"


# Picture -------------------------------------------------------------------------------------------------------------

_INK, _BLUE, _ORANGE, _GREEN, _GREY = "#222222", "#1f6fb4", "#d9730d", "#2a8c55", "#8a8a8a"


def draw_study(result: StudyResult) -> Figure:
    """Four panels: settings, layers, number of episodes, readouts."""
    figure = Figure(figsize=(14, 9.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"Calibration choices: {len(result.checkpoints)} checkpoints, {result.test_episodes} test episodes of "
        f"{result.source}",
        color=_INK, fontsize=12, x=0.01, ha="left", fontweight="bold",
    )  # fmt: skip
    panels = figure.subplots(2, 2).flatten()
    for axes, draw in zip(panels, (_draw_settings, _draw_layers, _draw_episodes, _draw_readout), strict=True):
        draw(axes, result)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_INK, labelsize=8.5)
    return figure


def _caption(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", color=_INK, fontsize=10.5)
    axes.legend(fontsize=8.5, frameon=False)


def _bars(values: Sequence[Spread]) -> list[list[float]]:
    """From the mean to the lowest and to the highest, as errorbar takes them."""
    return [[value.mean - value.low for value in values], [value.high - value.mean for value in values]]


def _draw_settings(axes: Axes, result: StudyResult) -> None:
    places = list(range(len(result.settings)))
    for prefix, colour, shift in ((_coarse(result), _BLUE, -0.12), (len(result.layers), _GREEN, 0.12)):
        values = [row.action_mse[prefix - 1] for row in result.settings]
        axes.errorbar(
            [value.mean for value in values], [place + shift for place in places], xerr=_bars(values),
            fmt="o", markersize=4, color=colour, label=_prefix_name(prefix, result),
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yticks(places, [row.setting for row in result.settings])
    axes.invert_yaxis()
    axes.grid(axis="x", color="#e3e3e3", linewidth=0.7)
    _caption(axes, "Action MSE in robot units², by setting")


def _draw_layers(axes: Axes, result: StudyResult) -> None:
    default, trained = result.settings[0], result.settings[-1]
    bits = [row.bits for row in result.layers]
    lines: list[tuple[str, str, Spreads]] = [
        ("action MSE, robot units²", _BLUE, default.action_mse),
        (f"action MSE, {trained.setting}", _GREY, trained.action_mse),
        ("bound on the latent error in [−1, 1]", _ORANGE, default.worst_case),
    ]
    for label, colour, values in lines:
        axes.errorbar(bits, [value.mean for value in values], yerr=_bars(values), marker="o", color=colour, label=label)
    axes.set_yscale("log")
    axes.set_xticks(bits, [f"L{row.layer}\n{row.bits:.0f} bits" for row in result.layers])
    axes.grid(axis="y", color="#e3e3e3", linewidth=0.7)
    _caption(axes, "What each layer brings")


def _draw_episodes(axes: Axes, result: StudyResult) -> None:
    if not result.episodes:
        _draw_reason(axes, result.omitted["episodes"])
        return
    counts = sorted({row.num_episodes for row in result.episodes})
    *settings, trained = _names(result.episodes)
    lines = [(name, _coarse(result), colour) for name, colour in zip(settings, (_BLUE, _ORANGE, _GREEN), strict=False)]
    lines += [(settings[0], len(result.layers), _INK), (trained, len(result.layers), _GREY)]
    for setting, prefix, colour in lines:
        values = [row.action_mse[prefix - 1] for row in result.episodes if row.setting == setting]
        axes.errorbar(
            counts, [value.mean for value in values], yerr=_bars(values), marker="o", capsize=2, color=colour,
            label=f"{setting}, {_prefix_name(prefix, result)}",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(counts, list(map(str, counts)))
    axes.minorticks_off()
    axes.grid(axis="y", color="#e3e3e3", linewidth=0.7)
    _caption(axes, "Action MSE in robot units², by number of calibration episodes")


def _draw_readout(axes: Axes, result: StudyResult) -> None:
    trained, *rows = result.readout
    lines: list[tuple[str, str, list[tuple[float, float]]]] = [
        ("test episodes", _BLUE, [(row.ridge or 0.0, row.test.mean / trained.test.mean) for row in rows]),
        ("worst unseen task", _GREEN, [(row.ridge or 0.0, row.unseen.high) for row in rows if row.unseen]),
        ("worst, another task alone", _ORANGE, [(row.ridge or 0.0, row.other.high) for row in rows if row.other]),
        ("random actions", _GREY, [(row.ridge or 0.0, row.random.mean) for row in rows]),
    ]
    for label, colour, points in lines:
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=label)
    axes.axhline(1, color=_INK, linewidth=1, linestyle="--", label="decoder as trained")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("ridge", color=_INK, fontsize=9)
    axes.grid(axis="y", color="#e3e3e3", linewidth=0.7)
    _caption(axes, "Readout: action MSE over that of the decoder as it was trained")


def _draw_reason(axes: Axes, reason: str) -> None:
    axes.text(0.5, 0.5, f"not measured:\n{reason}", ha="center", va="center", wrap=True, color=_GREY)
    axes.set_axis_off()
