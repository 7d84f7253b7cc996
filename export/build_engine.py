#!/usr/bin/env python3
"""Build a validated bundle from a trained checkpoint: calibrate, export, compile, prove, then write it all at once.

Without arguments the embedded robust checkpoint is built into build/bundle. With --from-bundle, engines for this
machine are added to a bundle that was built elsewhere; that needs neither torch nor the checkpoint. The exit
status is 0 for a bundle that passed every gate, 1 when a gate or a check failed, 2 for input that cannot be used; only
0 leaves or changes a bundle.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
if __name__ == "__main__":
    from rfsq.runtime.bundle.console import explain_missing_packages

    explain_missing_packages()

import argparse
import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from rfsq.export.batches import Profile
from rfsq.export.errors import BuildInputError, GateError
from rfsq.runtime.bundle.backend_specs import BACKENDS
from rfsq.runtime.bundle.console import escape_what_cannot_be_shown, path_argument
from rfsq.runtime.bundle.errors import RfsqError
from rfsq.runtime.bundle.manifest import MODES

if TYPE_CHECKING:
    from rfsq.export.on_target import TargetConfig
    from rfsq.export.pipeline import BuildConfig

#: A person, the system, a closed terminal, a reader that has left.
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)
_READOUTS = ("auto", "on", "off")


def parse_arguments(arguments: Sequence[str] | None = None) -> BuildConfig | TargetConfig:
    """Exits with status 2 and a message for arguments that make no sense."""
    parser = _parser()
    # Only what was given, so that every default stands in one place.
    given: dict[str, Any] = vars(parser.parse_args(arguments))
    for name in ("prefixes", "backends", "compute_capabilities"):
        if name in given:
            given[name] = tuple(given[name])
    try:
        if "profile" in given:
            given["profile"] = Profile(*given["profile"])
        if "from_bundle" in given:
            return _target_config(given)
        # Here, because a robot that adds engines has no torch.
        from rfsq.calibration.readout import ReadoutChoice
        from rfsq.export.pipeline import BuildConfig
        from rfsq.export.plan import DeployMode

        if "readout" in given:
            given["readout"] = ReadoutChoice(given["readout"])
        if "conditioning" in given:
            given["conditioning"] = DeployMode(given["conditioning"])
        return BuildConfig(**given)
    except BuildInputError as error:
        parser.error(str(error))


def _target_config(given: dict[str, Any]) -> TargetConfig:
    from rfsq.export.on_target import TargetConfig

    others = sorted(given.keys() - {"from_bundle", "backends", "profile"})
    if others:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise BuildInputError(f"{flags} cannot be changed in a bundle that is built; leave them out with --from-bundle")
    return TargetConfig(**{"bundle" if name == "from_bundle" else name: value for name, value in given.items()})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], argument_default=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=path_argument, help="default: the embedded robust one")
    parser.add_argument(
        "--use-layernorm",
        action=argparse.BooleanOptionalAction,
        help="how a checkpoint was trained that does not say it: with normalised residuals, or not",
    )
    parser.add_argument(
        "--weights",
        help="which model of a checkpoint that holds several, such as ema; default: the model, no average",
    )
    parser.add_argument(
        "--normaliser", type=path_argument, help="JSON with kind, offset and scale, folded into the engines"
    )
    parser.add_argument("--calibration-data", type=path_argument, help="episodes of the checkpoint's robot")
    parser.add_argument("--key", help="name of the action array or column in --calibration-data")
    parser.add_argument("--filter-key", metavar="NAME", help="episodes that this filter of a robomimic file lists")
    parser.add_argument("--output", type=path_argument, help="default: build/bundle")
    parser.add_argument("--overwrite", action="store_true", help="replace a bundle that is there")
    parser.add_argument("--conditioning", choices=MODES, help="default: calibrated if robust")
    parser.add_argument(
        "--readout",
        choices=_READOUTS,
        help="refit the decoder's last layer for calibrated tokens; default: auto, where it wins on calibration "
        "episodes left out of the fit",
    )
    parser.add_argument("--prefixes", type=int, nargs="+", help="default: 3; the full depth is always built")
    parser.add_argument("--chunk-length", type=int, help="T, default: 8")
    parser.add_argument(
        "--backends",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(BACKENDS)}; default: what is here, onnxruntime always",
    )
    parser.add_argument(
        "--compute-capabilities", nargs="+", help="such as 8.6 8.9; default: the library's portable target"
    )
    parser.add_argument(
        "--profile", type=int, nargs=3, metavar=("MIN", "OPT", "MAX"), help="batch sizes B, default: 1 1 4096"
    )
    parser.add_argument("--parity-steps", type=int, help="default: 120000")
    parser.add_argument(
        "--from-bundle",
        type=path_argument,
        metavar="BUNDLE",
        help="add engines for this machine to this bundle: those that can be proven here, or all of --backends",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    config = parse_arguments(arguments)
    escape_what_cannot_be_shown()
    with _clean_ends():
        try:
            _run(config)
        except GateError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except (RfsqError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


def _run(config: BuildConfig | TargetConfig) -> None:
    from rfsq.export.on_target import TargetConfig, add_engines

    if isinstance(config, TargetConfig):
        add_engines(config)
        return
    import torch

    from rfsq.export.pipeline import build

    # For matrices this small more threads are slower.
    torch.set_num_threads(1)
    build(config)


@contextlib.contextmanager
def _clean_ends() -> Iterator[None]:
    """A build that is told to end, by a person or by the system, cleans up after itself as one that fails does."""

    def end(number: int, _frame: object) -> NoReturn:
        if number != signal.SIGPIPE:
            print(f"ended by {signal.Signals(number).name}", file=sys.stderr)
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        # Python hands signals to the main thread alone: whoever calls from another decides what they do.
        yield
        return
    # What nohup or a shell has told the process to ignore stays ignored; SIGPIPE is ignored by Python itself.
    taken = [n for n in _ENDING if n == signal.SIGPIPE or signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in taken}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
