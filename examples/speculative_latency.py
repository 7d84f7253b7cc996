"""How long each part takes, one observation after the other, as in a loop."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from examples.speculative_acceptance import Speculation
from examples.speculative_data import Windows
from examples.speculative_report import Rows

#: The first calls fill caches.
WARM_UP = 10


class Stopwatch:
    """Microseconds of one part after the other."""

    def __init__(self) -> None:
        self.us: dict[str, list[float]] = {}

    def time(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        begin = time.perf_counter()
        result = call(*arguments)
        self.us.setdefault(name, []).append(1e6 * (time.perf_counter() - begin))
        return result


def latency_table(speculation: Speculation, held_out: Windows, count: int) -> Rows:
    """Medians over `count` observations of this machine, now; and how long the first action takes."""
    watch, tokenizer = Stopwatch(), speculation.tokenizer.tokenizer
    out = np.empty((1, *held_out.actions.shape[1:]), np.float32)
    first: dict[str, list[float]] = {"draft": [], "refused": [], "coarse": [], "alone": []}
    main, coarse = speculation.main, range(speculation.layers)
    for turn in range(WARM_UP + count):
        if turn == WARM_UP:
            watch = Stopwatch()
        context = held_out.context[[turn % len(held_out)]]
        proposed = watch.time("draft", speculation.propose, context)
        verdict = watch.time("verification", speculation.verify, context, proposed)
        watch.time("prefix decode", tokenizer.decode_into, verdict.early.numpy(), out)
        rest = "rest, all steps accepted" if verdict.kept.all() else "rest, a step refused"
        full = watch.time(rest, speculation.finish, context, verdict)
        watch.time("full decode", tokenizer.decode_into, full.numpy(), out)
        watch.time("main alone, coarse layers", main.say, context, main.silence(1), coarse)
        alone = watch.time("main alone", speculation.alone, context)
        watch.time("full decode", tokenizer.decode_into, alone.numpy(), out)
        if turn < WARM_UP:
            continue
        parts = {name: values[-1] for name, values in watch.us.items()}
        begun = parts["draft"] + parts["verification"]
        if verdict.accepted[0]:
            first["draft"].append(begun + parts["prefix decode"])
        else:
            first["refused"].append(begun + parts[rest] + parts["full decode"])
        first["coarse"].append(parts["main alone, coarse layers"] + parts["prefix decode"])
        first["alone"].append(parts["main alone"] + parts["full decode"])

    passes = {"draft": len(coarse), "verification": 1, "main alone, coarse layers": len(coarse)}
    passes |= {"main alone": main.num_layers}
    timed = {
        f"{name}, {passes[name]} pass{'es' * (passes[name] > 1)}" if name in passes else name: values
        for name, values in watch.us.items()
    }
    for name, label in (
        ("draft", "first action, draft accepted"),
        ("refused", "first action, draft refused"),
        ("coarse", "first action, main alone, coarse"),
        ("alone", "first action, main alone, all layers"),
    ):
        if first[name]:
            share = f" ({100 * len(first[name]) / count:.0f} %)" * (name in ("draft", "refused"))
            timed[label + share] = first[name]
    rows = [(name, f"{np.median(values):.1f}", f"{np.quantile(values, 0.99):.1f}") for name, values in timed.items()]
    return [("one observation", "median, us", "p99, us"), *rows]
