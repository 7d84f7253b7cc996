"""The calibration study for people: tables, a picture, and the files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from rfsq.calibration.errors import CalibrationError
from rfsq.calibration.recovered import COARSE_LAYERS
from rfsq.calibration.study_result import EpisodesRow, LayerRow, Spread, Spreads, StudyResult, result_to_json
from rfsq.calibration.tables import Part, Table, as_text, prefix_name
from rfsq.rfsq_ref.drawing import BLUE, GREEN, GREY, INK, ORANGE, finish, new_figure, save_png
from rfsq.runtime.bundle.console import aligned
from rfsq.runtime.bundle.paths import replacing

RESULT_JSON = "calibration.json"
RESULT_PNG = "calibration.png"
#: Columns of the layers' table that a first look needs.
_WORTH_TITLE = "What each layer brings in the default setting; -v prints every table"
_WORTH = ("up to layer", "bits per step", "action MSE", "action MSE falls by a factor of", "pays on")
_NONE = "–"


def parts(result: StudyResult) -> dict[str, Part]:
    """The defaults in a line, and tables by name: settings, readout, episodes, tasks, layers.

    In place of a table that could not be measured stands the reason.
    """
    tables = {
        "settings": _settings_table,
        "readout": _readout_table,
        "episodes": _episodes_table,
        "tasks": _tasks_table,
        "layers": _layers_table,
    }
    found: dict[str, Part] = {"defaults": _defaults(result)}
    for name, table in tables.items():
        found[name] = f"Not measured: {result.omitted[name]}." if name in result.omitted else table(result)
    return found


def format_study(result: StudyResult, *, is_verbose: bool = True) -> str:
    """What was studied and the worth of the layers as text; is_verbose: all tables."""
    count = len(result.checkpoints)
    head = (
        f"{count} checkpoint{'s' if count > 1 else ''}, fitted on {result.calibration_episodes} episodes "
        f"({result.calibration_steps} steps), judged on {result.test_episodes} others ({result.test_steps} steps)\n"
        f"of {result.source}; MSE in robot units²\n{fill(_defaults(result), 100)}"
    )
    alone = [
        ("autoencoder as trained, no quantiser, action MSE", _both(result.unquantised)),
        ("readout refitted, no quantiser", _both(result.unquantised_readout)),
    ]
    head = "\n".join([head, *aligned(alone, left=2)])
    if not is_verbose:
        return as_text([head, _layers_table(result).only(_WORTH_TITLE, *_WORTH)])
    named = [
        f"{name}: {part.replace('Not', 'not', 1)}" if isinstance(part, str) else part
        for name, part in parts(result).items()
    ]
    return as_text([head, *named[1:]])


def study_files(folder: Path) -> tuple[Path, ...]:
    """What write_study writes."""
    return folder / RESULT_JSON, folder / RESULT_PNG


def write_study(result: StudyResult, folder: Path) -> None:
    """calibration.json and calibration.png into a folder, made if missing. CalibrationError if it cannot be written."""
    save_png(draw_study(result), folder / RESULT_PNG, CalibrationError)
    with replacing(folder / RESULT_JSON, error=CalibrationError) as path:
        path.write_text(result_to_json(result), encoding="utf-8")


# Tables --------------------------------------------------------------------------------------------------------------


def _defaults(result: StudyResult) -> str:
    named = (f"{name.replace('_', ' ')} `{value}`" for name, value in result.default.items())
    return f"The defaults: {', '.join(named)}."


def _settings_table(result: StudyResult) -> Table:
    coarse = _coarse(result)
    named = prefix_name(coarse, len(result.layers))
    prefixes = sorted({1, min(2, coarse), coarse, len(result.layers)})
    return Table.of(
        "Settings, each with one choice other than the default: errors on the test episodes by the layers decoded "
        f"({named}: these alone; all: every layer), MSE in robot units², what quantising adds to the squared error of "
        "actions drawn evenly from the recorded ranges, and the bound on the latent error; mean ± standard deviation "
        f"{_over(result)}, of the bound the highest",
        (
            {
                "setting": row.setting,
                **{
                    f"action MSE, {prefix_name(prefix, len(result.layers))}": _both(row.action_mse[prefix - 1])
                    for prefix in prefixes
                },
                f"largest action error, {named}": _number(row.max_error[coarse - 1].mean),
                f"added MSE on random actions, {named}": _number(row.random[coarse - 1].mean),
                "added MSE on random actions, all": _number(row.random[-1].mean),
                "bound on the latent error, all": _number(row.worst_case[-1].high),
            }
            for row in result.settings
        ),
    )


def _readout_table(result: StudyResult) -> Table:
    return Table.of(
        "Readouts by their ridge, without a quantiser: action MSE in robot units² on calibration episodes left out "
        f"of the fit and on the test episodes, mean ± standard deviation {_over(result)}; then action MSE as a "
        "multiple of that of the decoder as trained, below 1x the readout helps",
        (
            {
                "ridge": "readout off" if row.ridge is None else f"{row.ridge:.0e}".replace("e-0", "e-"),
                "cross-validated action MSE": _both(row.cross_validated),
                "test action MSE": _both(row.test),
                "random actions, over decoder as trained": _worst(row.random),
                "unseen task, over decoder as trained": _worst(row.unseen),
                "fitted to another task alone, over decoder as trained": _worst(row.other),
            }
            for row in result.readout
        ),
    )


def _episodes_table(result: StudyResult) -> Table:
    rows = {(row.setting, row.num_episodes): row for row in result.episodes}
    settings = _names(result.episodes)
    columns = [(setting, _coarse(result)) for setting in settings[:-1]]
    columns += [(setting, len(result.layers)) for setting in (settings[0], settings[-1])]
    return Table.of(
        "Number of calibration episodes: action MSE in robot units² on the test episodes, mean (lowest … highest) "
        f"over random choices of episodes and {_over(result)}",
        (
            {"episodes": str(count)}
            | {
                f"action MSE, {setting}, {prefix_name(prefix, len(result.layers))}": _range(
                    rows[setting, count].action_mse[prefix - 1]
                )
                for setting, prefix in columns
            }
            for count in sorted({count for _, count in rows})
        ),
    )


def _tasks_table(result: StudyResult) -> Table:
    return Table.of(
        "Fitted to these tasks, tested on one: action MSE as a multiple of that of the unquantised autoencoder "
        f"with the setting's own readout, mean over tasks and {_over(result)}",
        (
            {"setting": row.setting}
            | {
                f"{kind}, {prefix_name(prefix, len(result.layers))}": _worst(found[prefix - 1])
                for prefix in (_coarse(result), len(result.layers))
                for kind, found in (
                    ("fitted to every task", row.seen),
                    ("to all but the tested", row.unseen),
                    ("to another task alone", row.other),
                )
            }
            for row in result.tasks
        ),
    )


def _layers_table(result: StudyResult) -> Table:
    default, trained = result.settings[0], result.settings[-1]
    return Table.of(
        "Layers: what each one brings in the default setting, decoded with all before it. It pays on the data "
        "where it lowers the action MSE by 5 % or more, in the worst case where it halves the bound on the latent "
        "error of any latent in [-1, 1]",
        (
            {
                "up to layer": f"L{row.layer}",
                "bits per step": f"{row.bits:.0f}",
                "action MSE": _both(default.action_mse[row.layer]),
                "action MSE falls by a factor of": _both(row.gain, "{:.2f}".format, "x"),
                f"action MSE, {trained.setting}": _both(trained.action_mse[row.layer]),
                "bound on the latent error": _number(default.worst_case[row.layer].high),
                "bound falls by a factor of": _both(row.worst_case_gain, "{:.2f}".format, "x"),
                "levels used in the test episodes": f"{row.levels_used.mean:.0%}",
                "pays on": _pays(row),
            }
            for row in result.layers
        ),
    )


def _pays(row: LayerRow) -> str:
    where = (("data", row.pays_on_data), ("worst case", row.pays_in_worst_case))
    return ", ".join(name for name, pays in where if pays) or "neither"


def _names(rows: Sequence[EpisodesRow]) -> list[str]:
    """Of the settings, in their order: the default first, the decoder as it was trained last."""
    return list(dict.fromkeys(row.setting for row in rows))


def _coarse(result: StudyResult) -> int:
    return min(COARSE_LAYERS, len(result.layers))


def _over(result: StudyResult) -> str:
    count = len(result.checkpoints)
    return f"over {count} checkpoints" if count > 1 else "of one checkpoint"


def _number(value: float) -> str:
    """Three digits; 1.53e-5 rather than 1.53e-05."""
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.3g}"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{digits}e{int(exponent)}"


def _both(value: Spread | None, number: Callable[[float], str] = _number, unit: str = "") -> str:
    """Mean and deviation."""
    if value is None:
        return _NONE
    return number(value.mean) + unit + ("" if value.deviation is None else f" ± {number(value.deviation)}")


def _range(value: Spread) -> str:
    return f"{_number(value.mean)} ({_number(value.low)} … {_number(value.high)})"


def _worst(value: Spread | None) -> str:
    """Mean and highest of ratios."""
    return _NONE if value is None else f"{value.mean:.2f}x (worst {value.high:.2f}x)"


# Picture -------------------------------------------------------------------------------------------------------------


def draw_study(result: StudyResult) -> Figure:
    """Four panels: settings, layers, number of episodes, readouts."""
    figure = new_figure(18, f"Calibration choices: {len(result.checkpoints)} checkpoints, {result.source}")
    grid = figure.add_gridspec(4, 1)
    for row, draw in enumerate((_draw_settings, _draw_layers, _draw_episodes, _draw_readout)):
        # Each in a part of its own: long labels of one make the others no narrower.
        draw(figure.add_subfigure(grid[row]).subplots(), result)
    return figure


def _bars(values: Sequence[Spread]) -> list[list[float]]:
    """From the mean to the lowest and to the highest, as errorbar takes them."""
    return [[value.mean - value.low for value in values], [value.high - value.mean for value in values]]


def _draw_settings(axes: Axes, result: StudyResult) -> None:
    places = list(range(len(result.settings)))
    for prefix, colour, shift in ((_coarse(result), BLUE, -0.12), (len(result.layers), GREEN, 0.12)):
        values = [row.action_mse[prefix - 1] for row in result.settings]
        axes.errorbar(
            [value.mean for value in values], [place + shift for place in places], xerr=_bars(values),
            fmt="o", markersize=4, color=colour, label=prefix_name(prefix, len(result.layers)),
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yticks(places, [row.setting for row in result.settings])
    axes.invert_yaxis()
    finish(axes, "Action MSE in robot units², by setting", grid="x")


def _draw_layers(axes: Axes, result: StudyResult) -> None:
    default, trained = result.settings[0], result.settings[-1]
    bits = [row.bits for row in result.layers]
    lines: list[tuple[str, str, Spreads]] = [
        ("action MSE, robot units²", BLUE, default.action_mse),
        (f"action MSE, {trained.setting}", GREY, trained.action_mse),
        ("bound on the latent error in [−1, 1]", ORANGE, default.worst_case),
    ]
    for label, colour, values in lines:
        axes.errorbar(bits, [value.mean for value in values], yerr=_bars(values), marker="o", color=colour, label=label)
    axes.set_yscale("log")
    axes.set_xticks(bits, [f"L{row.layer}\n{row.bits:.0f}" for row in result.layers])
    finish(axes, "What each layer brings; below it, bits per step", grid="y")


def _draw_episodes(axes: Axes, result: StudyResult) -> None:
    if not result.episodes:
        _draw_reason(axes, result.omitted["episodes"])
        return
    counts = sorted({row.num_episodes for row in result.episodes})
    *settings, trained = _names(result.episodes)
    lines = [(name, _coarse(result), colour) for name, colour in zip(settings, (BLUE, ORANGE, GREEN), strict=False)]
    lines += [(settings[0], len(result.layers), INK), (trained, len(result.layers), GREY)]
    for setting, prefix, colour in lines:
        values = [row.action_mse[prefix - 1] for row in result.episodes if row.setting == setting]
        axes.errorbar(
            counts, [value.mean for value in values], yerr=_bars(values), marker="o", capsize=2, color=colour,
            label=f"{setting}, {prefix_name(prefix, len(result.layers))}",
        )  # fmt: skip
    axes.loglog()
    axes.set_xticks(counts, list(map(str, counts)))
    axes.minorticks_off()
    finish(axes, "Action MSE in robot units², by calibration episodes", grid="y")


def _draw_readout(axes: Axes, result: StudyResult) -> None:
    trained, *rows = result.readout
    lines: list[tuple[str, str, list[tuple[float, float]]]] = [
        ("test episodes", BLUE, [(row.ridge or 0.0, row.test.mean / trained.test.mean) for row in rows]),
        ("worst unseen task", GREEN, [(row.ridge or 0.0, row.unseen.high) for row in rows if row.unseen]),
        ("worst, another task alone", ORANGE, [(row.ridge or 0.0, row.other.high) for row in rows if row.other]),
        ("random actions", GREY, [(row.ridge or 0.0, row.random.mean) for row in rows]),
    ]
    for label, colour, points in lines:
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=label)
    axes.axhline(1, color=INK, linewidth=1, linestyle="--", label="decoder as trained")
    axes.loglog()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("ridge", color=INK, fontsize=9)
    finish(axes, "Readout: action MSE over that of the trained decoder", grid="y")


def _draw_reason(axes: Axes, reason: str) -> None:
    axes.text(0.5, 0.5, f"not measured:\n{reason}", ha="center", va="center", wrap=True, color=GREY)
    axes.set_axis_off()
