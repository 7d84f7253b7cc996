"""Inject faults of every kind into decoders of this bundle, and say which were answered wrongly.

First into every setup of `ControlDecoder` (strategies, worker, fallback, action kinds, what a fault does), on a clock
of its own; then faults that need real processes, disks and files. Prints a line for each group of faults, or with -v
for each kind.
"""

if __name__ == "__main__":
    from ..bundle.start import run_script

    # Before the imports below, which take long enough for Ctrl-C.
    run_script(f"{__package__}.campaign")

import argparse
import contextlib
import itertools
import logging
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..backends.beliefs import decodes_beliefs
from ..backends.contract import Backend
from ..backends.registry import PREFERENCE
from ..bundle.backend_specs import BACKENDS
from ..bundle.command import DONE, WANTING, CommandParser, Outcome, natural, run
from ..bundle.errors import InvalidInputError, TokenizerError
from ..bundle.folder import open_bundle
from ..control.belief_config import WhenUncertain
from ..control.config import ActionKind, OnFault, OutOfRange, Status, Strategy
from ..tokenizer import ActionTokenizer
from .fault_report import FaultReport
from .injection import with_nan_weights
from .kinds import Kind, kinds_with
from .rig import PATIENCE_S, Answer, Rig, Setup
from .system import run_system_faults

#: How long a thread that is free takes to go on, and a backend to come back.
_THREAD_S, _RECOVERY_S = 0.02, PATIENCE_S
_DROPPED = (Status.BAD_TOKEN, Status.NONFINITE, Status.OUT_OF_RANGE, Status.BACKEND_FAULT)

#: Every strategy with and without a worker and a fallback, for all action kinds and both ways to go on after a fault;
#: and the settings that change what one status means.
SETUPS: tuple[Setup, ...] = (
    *itertools.starmap(
        Setup,
        itertools.product(
            Strategy,
            (False, True),
            (False, True),
            (ActionKind.DELTA, ActionKind.ABSOLUTE, None),
            (OnFault.HOLD_LAST, OnFault.STOP),
        ),
    ),
    *(Setup(has_fallback=has, on_fault=OnFault.RAISE, action_kind=None) for has in (False, True)),
    *(Setup(strategy, out_of_range=OutOfRange.LIMIT, action_kind=None) for strategy in Strategy),
    *(
        Setup(strategy, action_kind=None, when_uncertain=when)
        for strategy in Strategy
        for when in (WhenUncertain.SLOW, WhenUncertain.ASK)
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    return run(_parser(), _work, arguments)


def _parser() -> CommandParser:
    parser = CommandParser(
        "runtime/qualification/campaign.py",
        "inject faults of every kind into the control loop: is each answered rightly?",
        wanting="a fault was answered wrongly",
    )
    parser.add_bundle()
    parser.add_backend("auto; it is made to fail")
    parser.add_argument("--fallback", choices=tuple(BACKENDS), help="default: the best other one that works here")
    parser.add_argument(
        "--faults", type=natural, default=10_000, metavar="N", help="on the clock of its own; 0 for none"
    )
    parser.add_argument(
        "--system", type=natural, default=10, metavar="N", help="of each kind with real processes and files; 0 for none"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return parser


def _work(options: argparse.Namespace) -> Outcome:
    if not options.faults + options.system:
        raise InvalidInputError("--faults and --system are both 0; give a number of faults to one of them")
    reports: list[FaultReport] = []
    with contextlib.ExitStack() as stack:
        stack.callback(logging.disable, logging.NOTSET)
        logging.disable(logging.CRITICAL)
        main_one = stack.enter_context(ActionTokenizer.load(options.bundle, backend=options.backend))
        if options.faults:
            fallback = stack.enter_context(_open_fallback(options.bundle, main_one, options.fallback))
            nan_backends = nan_backends_of(options.bundle)
            print(
                f"{main_one.backend.description}; falls back on {fallback.backend.description}; NaN weights in "
                f"{', '.join(nan_backends) or 'no backend'}",
                flush=True,
            )
            reports.append(
                run_campaign(main_one, options.faults, fallback=fallback, nan_backends=nan_backends, seed=options.seed)
            )
            print(reports[-1].text(is_verbose=options.verbose), flush=True)
        if options.system:
            reports.append(run_system_faults(options.bundle, options.system, backend=main_one.backend.name))
            print(reports[-1].text(is_verbose=options.verbose))
    problems = [problem for report in reports for problem in report.problems]
    verdict = f"✗ {len(problems)} things were wrong" if problems else "✓ every fault was answered rightly"
    document = {"reports": [report.document() for report in reports], "problems": problems}
    return Outcome(f"{verdict}: {main_one.backend.name}", document, WANTING if problems else DONE)


def run_campaign(  # noqa: PLR0913  # settings, given by name
    tokenizer: ActionTokenizer,
    faults: int,
    *,
    fallback: ActionTokenizer | None = None,
    nan_backends: dict[str, Backend] | None = None,
    seed: int = 0,
    setups: Sequence[Setup] = SETUPS,
) -> FaultReport:
    """Inject that many faults, equally many in each setup; rare kinds come at most once in each."""
    begin = time.monotonic()
    rng = random.Random(seed)
    takes_beliefs = all(decodes_beliefs(found.backend) for found in (tokenizer, fallback or tokenizer))
    kinds = kinds_with(nan_backends or {}, tokenizer.model, takes_beliefs=takes_beliefs)
    # All kinds in random order, again and again.
    deck = itertools.chain.from_iterable(rng.sample(kinds, len(kinds)) for _ in itertools.count())
    report = FaultReport()
    ticks, longest = 0, 0.0
    times: list[float] = []
    for place, setup in enumerate(setups):
        rig = Rig(tokenizer, setup, rng, fallback=fallback)
        with contextlib.closing(rig):
            done, drawn = 0, set[str]()
            while done < (place + 1) * faults // len(setups) - place * faults // len(setups):
                kind = next(deck)
                if not kind.applies(setup) or kind.name in drawn:
                    continue
                if kind.is_slow:
                    drawn.add(kind.name)
                answer, found = inject(rig, kind)
                done += 1
                report.add(f"due {kind.status.name}", kind.name, str(answer), [f"({setup}) {text}" for text in found])
                if kind.is_slow:
                    longest = max(longest, answer.seconds)
                else:
                    times.append(answer.seconds)
            ticks += rig.decoder.snapshot().ticks
    p50, p99, most = np.percentile(times or [0.0], (50, 99, 100)) * 1e6
    report.where = f"in {len(setups)} setups, {ticks} ticks"
    report.seconds = time.monotonic() - begin
    report.facts = {
        "setups": len(setups),
        "ticks": ticks,
        "answer_us": (float(p50), float(p99), float(most)),
        "longest_hang_s": longest,
    }
    report.remarks = (
        f"a tick that notices a fault takes p50 {p50:.0f}  p99 {p99:.0f}  max {most:.0f} us",
        f"the longest tick with a backend that hangs took {longest * 1e3:.0f} ms",
    )
    return report


def inject(rig: Rig, kind: Kind) -> tuple[Answer, list[str]]:
    """Inject one fault in the middle of service, until service goes on; returns the answer, and what was wrong."""
    problems: list[str] = []
    rig.check.problems.clear()
    if (before := rig.good()).status is not Status.OK:
        problems.append(f"before it: {before}: {before.detail}")
    rig.idle(rig.length)
    recoveries = rig.decoder.health.recoveries
    answer = kind.inject(rig)
    expected, to_recover = kind.expected(rig.setup, rig.length), kind.recoveries(rig.setup)
    if str(answer) != str(expected):
        to_recover = 0
        problems.append(f"{answer}, expected {expected}: {answer.detail}")
    # Other ticks run on the rig's clock, and how long they really take is the machine's affair.
    if kind.is_slow and answer.seconds >= PATIENCE_S:
        problems.append(f"answered after {answer.seconds:.3f} s")
    _look_after(rig, answer, problems)
    rig.clear()
    _return_to_service(rig, kind, problems)
    if to_recover and not _comes_back(rig, recoveries + to_recover):
        problems.append("what had failed was not taken back")
    return answer, problems + rig.check.problems


def _look_after(rig: Rig, answer: Answer, problems: list[str]) -> None:
    """Check that nothing queued before a refused chunk is served after it, and that only `reset()` ends a latch."""
    # Not each time: service is to go on at once after a fault, too.
    if rig.rng.randrange(2):
        return
    if answer.is_held and answer.status in _DROPPED:
        after = rig.tick()
        if not after.is_held:
            problems.append(f"the tick after it: {after}")
    rig.idle(1)
    rig.clear()
    if answer.is_latched:
        refused = rig.good()
        if not refused.is_held or refused.status is not answer.status:
            problems.append(f"latched, and then {refused}")
        rig.reset()
        empty = rig.tick()
        if (empty.status, empty.is_held) != (Status.NOT_READY, True):
            problems.append(f"after reset: {empty}")


def _return_to_service(rig: Rig, kind: Kind, problems: list[str]) -> None:
    """Check that the next chunk is served; if a thread has to come back first, one of the next T chunks."""
    for _ in range(rig.length if kind.takes_time else 1):
        if rig.decoder.result.is_latched:
            rig.reset()
        after = rig.send(rig.pick())
        if (after.status, after.is_held) == (Status.OK, False):
            return
        time.sleep(_THREAD_S)
    problems.append(f"no service after it: {after}: {after.detail}")


def _comes_back(rig: Rig, recoveries: int) -> bool:
    """Whether so many backends have come back; service goes on meanwhile, as the loop needs it to notice them."""
    for _ in range(round(_RECOVERY_S / _THREAD_S)):
        if rig.wait_for(lambda: rig.decoder.health.recoveries >= recoveries, _THREAD_S):
            return True
        rig.send(rig.pick())
    return False


def nan_backends_of(path: Path) -> dict[str, Backend]:
    """Backends of this machine whose weights can be altered, with NaN in them."""
    bundle, found = open_bundle(path), {}
    for name in ("onnxruntime", "c"):
        with contextlib.suppress(TokenizerError):
            found[name] = with_nan_weights(bundle, name)
    return found


def _open_fallback(path: Path, main_one: ActionTokenizer, wanted: str | None) -> ActionTokenizer:
    if wanted:
        return ActionTokenizer.load(path, backend=wanted)
    for name in PREFERENCE:
        if name != main_one.backend.name:
            with contextlib.suppress(TokenizerError):
                return ActionTokenizer.load(path, backend=name)
    return ActionTokenizer.load(path, backend=main_one.backend.name)
