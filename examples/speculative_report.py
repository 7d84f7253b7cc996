"""Action error and acceptance on held-out episodes, beside what needs no model at all: rows of tables, and verdicts."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from examples.speculative_acceptance import Speculation, Verdict
from examples.speculative_data import Windows, most_frequent
from examples.speculative_loop import CONFIG, Run

Rows = list[tuple[str, ...]]
#: What one unit of dx, dy or dz is to the controller of the demonstrations.
UNIT_MM = 50.0


def error_table(
    speculation: Speculation, trained: Windows, held_out: Windows, verdict: Verdict
) -> tuple[Rows, dict[str, float]]:
    """And the action MSE by row."""
    context, codes, layers = held_out.context, held_out.codes, speculation.layers
    alone = speculation.alone(context)
    full, usual = speculation.finish(context, verdict), most_frequent(trained.codes, speculation.main.num_levels)
    coarse = f"L0–L{layers - 1}"
    tokens = {
        "most frequent token at each place": usual.expand_as(codes),
        "last chunk once more": held_out.codes_before,
        f"draft, {coarse}": speculation.propose(context),
        f"main, {coarse}": alone[..., :layers],
        "main, all layers": alone,
        "served early: accepted, corrected": verdict.early,
        "full, accepted steps kept": full,
        f"demonstrator's own tokens, {coarse}": codes[..., :layers],
        "demonstrator's own tokens, all": codes,
    }
    decode = speculation.tokenizer.decode_from_indices
    decoded: dict[str, Tensor] = {name: decode(part) for name, part in tokens.items()}
    decoded["last action held"] = held_out.before[:, -1:].expand_as(held_out.actions)
    names = ["most frequent token at each place", "last chunk once more", "last action held", *list(tokens)[2:]]
    shown = range(min(layers + 1, codes.shape[-1]))
    heads = (f"L{layer} equal" for layer in shown)
    rows: Rows = [("on held-out episodes", "action MSE", "position", "gripper", *heads)]
    errors = {}
    for name in names:
        difference = decoded[name] - held_out.actions
        errors[name] = difference.square().mean().item()
        millimetres = UNIT_MM * difference[..., :3].norm(dim=-1).mean().item()
        wrong = ((decoded[name][..., -1] > 0) != (held_out.actions[..., -1] > 0)).double().mean().item()
        said = tokens.get(name, codes[..., :0])
        equal = [(said[..., n] == codes[..., n]).double().mean().item() for n in shown if n < said.shape[-1]]
        cells = [*map(_percent, equal), *[""] * (len(shown) - len(equal))]
        rows.append((name, f"{errors[name]:.3g}", f"{millimetres:.2f} mm", _percent(wrong), *cells))
    return rows, errors


def acceptance_table(
    speculation: Speculation, trained: Windows, held_out: Windows, generator: torch.Generator
) -> tuple[Rows, dict[str, float]]:
    """And the acceptance rate by who proposes.

    tokens: the main model says the same, given those before; steps: within the tolerance, each on its own; chunks: at
    least the first step is accepted; then the acceptance rate: steps in accepted runs, among all.
    """
    context, layers, levels = held_out.context, speculation.layers, speculation.main.num_levels
    coarse = held_out.codes[..., :layers]
    proposals = {
        "draft": speculation.propose(context),
        "last chunk once more": held_out.codes_before[..., :layers],
        "most frequent": most_frequent(trained.codes, levels)[..., :layers].expand_as(coarse),
        "random": torch.randint(levels, coarse.shape, generator=generator),
        "demonstrator": coarse,
    }
    tolerances = [speculation.tolerance * factor for factor in (0.5, 1, 2)]
    heads = (f"accepted at {tolerance:.3g}" for tolerance in tolerances)
    rows: Rows = [("proposed by", "tokens", "steps", "chunks", *heads)]
    rates = {}
    for name, proposal in proposals.items():
        verdict = speculation.verify(context, proposal)
        within = [(verdict.difference <= tolerance).long().cumprod(dim=-1) for tolerance in tolerances]
        rates[name] = verdict.rate
        steps = (verdict.difference <= speculation.tolerance).double().mean().item()
        begun = (verdict.accepted > 0).double().mean().item()
        shares = (verdict.agreed, steps, begun, *(part.double().mean().item() for part in within))
        rows.append((name, *map(_percent, shares)))
    return rows, rates


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def loop_table(alone: Run, early: Run) -> Rows:
    """Both, side by side."""
    columns = []
    for run in (alone, early):
        column = {
            "first action after, ticks": float(np.mean(run.first)),
            "action MSE of what was sent": float(np.mean(run.errors)),
            "chunks served early, %": 100 * len(run.lead) / run.looks,
            "ticks held back by the slew limit, %": 100 * run.limited / run.ticks,
        }
        column |= {
            f"ticks {'' if source == 'held' else 'from '}{source}, %": 100 * count / run.ticks
            for source, count in run.served.items()
        }
        columns.append(column)
    head = (f"in the loop, {early.ticks} ticks, simulated time", "main alone", "with draft")
    return [head, *((name, f"{value:.3g}", f"{columns[1][name]:.3g}") for name, value in columns[0].items())]


def verdicts(errors: Mapping[str, float], rates: Mapping[str, float], alone: Run, early: Run) -> list[tuple[bool, str]]:
    """Whether the models have learnt anything, and whether the loop kept what it promises."""
    main, draft = errors["main, all layers"], next(mse for name, mse in errors.items() if name.startswith("draft, "))
    usual, again = errors["most frequent token at each place"], errors["last chunk once more"]
    chance = max(rates[name] for name in ("last chunk once more", "most frequent", "random"))
    unsafe, ticks, refused = alone.unsafe + early.unsafe, alone.ticks + early.ticks, alone.refused + early.refused
    largest, slew = max(early.steps, default=0), CONFIG.max_relative_step[0]
    first = [float(np.mean(run.first)) for run in (early, alone)]
    return [
        (
            max(main, draft) < min(usual, again),
            f"action MSE {main:.2g} (main), {draft:.2g} (draft); the last chunk once more {again:.2g}",
        ),
        (
            rates["draft"] > chance,
            f"{100 * rates['draft']:.1f} % of the draft's steps accepted; without a model at most {100 * chance:.1f} %",
        ),
        (not unsafe, f"{unsafe} of {ticks} actions outside limits or slew"),
        (not refused, f"{refused} chunks refused"),
        (
            bool(early.lead) and min(early.lead) > 0,
            f"{len(early.lead)} chunks served early, {np.mean(early.lead or 0):.1f} ticks before their full decode; "
            f"largest step at a swap {largest:.3f}, limit {slew:g}",
        ),
        (first[0] < first[1], f"the first action leaves after {first[0]:.1f} ticks, without the draft {first[1]:.1f}"),
    ]
