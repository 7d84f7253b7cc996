#!/usr/bin/env python3
"""The command that builds a validated bundle from a checkpoint: calibrate, export, compile, prove, then write it.

Without arguments the embedded robust checkpoint is built into build/bundle. With --from-bundle, engines for this
machine are added to a bundle that was built elsewhere; that needs neither torch nor the checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__":
    from rfsq.runtime.bundle.start import run_script

    run_script("rfsq.export.build_engine")

import argparse
import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from rfsq.export.errors import BuildInputError
from rfsq.runtime.bundle.advice import command
from rfsq.runtime.bundle.command import DATA_FORMATS, CommandParser, Outcome, path_argument, refuse_idle_choices, run
from rfsq.runtime.bundle.modes import STEP_MODES

if TYPE_CHECKING:
    from rfsq.export.build_config import BuildConfig
    from rfsq.export.on_target import TargetConfig
    from rfsq.runtime.bundle.manifest import Manifest

#: The system, a closed terminal, a reader that has left.
_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)
_READOUTS = ("auto", "on", "off")
_KINDS = ("step", "chunk")
_ORDERS = ("own", "shared")


def main(arguments: Sequence[str] | None = None) -> int:
    return run(parser(), _work, arguments)


def parser() -> CommandParser:
    """All arguments of the command; what is not given is not there, so that every default stands in one place."""
    parser = CommandParser(
        "build",
        wanting="a gate or a check failed, and nothing is written",
        interrupted="--output is as it was",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_checkpoint()
    parser.add_data(
        "--calibration-data", text=f"episodes of the checkpoint's robot: .pt, {DATA_FORMATS}",
        default="the embedded demonstrations, for checkpoints that were trained on them",
    )  # fmt: skip
    parser.add_argument(
        "--kind", choices=_KINDS,
        help="step: tokens of single steps, of a trained checkpoint; chunk: tokens of a whole chunk, fitted to "
        "the data where no checkpoint of them is given; default: that of the checkpoint, else step",
    )  # fmt: skip
    for name, text in (
        ("classes", "C, with escape; default: 64, fewer where there are few data"),
        ("vocabulary", "words of a token, a power of two; default: 1024"),
        ("tokens", "L, of a chunk; default: as many as 8 bits of each value take"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="X", help=f"of a fit of chunk tokens: {text}")
    parser.add_argument("--order", choices=_ORDERS, help="of a fit of chunk tokens: of the first bits; default: own")
    parser.add_output("folder of the bundle; default: build/bundle, of chunk tokens build/chunk")
    parser.refuse_former(
        "--bundle",
        f"{command('build', '--output DIR')} writes a bundle, and {command('build', '--from-bundle DIR')} adds to one",
    )
    parser.add_backends("what is here, onnxruntime always")
    parser.add_argument(
        "--from-bundle", type=path_argument, metavar="BUNDLE",
        help="add engines for this machine to this bundle: those that can be proven here, or all of --backend; needs "
        "neither torch nor the checkpoint",
    )  # fmt: skip
    parser.add_argument(
        "--normaliser", type=path_argument, metavar="F",
        help="JSON with kind, offset and scale, folded into the engines; for a fit of chunk tokens also auto, none or "
        "min-max, default: auto",
    )  # fmt: skip
    parser.add_argument("--conditioning", choices=STEP_MODES, help="default: calibrated if robust")
    parser.add_argument(
        "--readout", choices=_READOUTS,
        help="refit the decoder's last layer for calibrated tokens; default: auto, where it wins on calibration "
        "episodes left out of the fit",
    )  # fmt: skip
    parser.add_argument(
        "--prefixes", type=int, nargs="+", metavar="L", help="default: 3; the full depth is always built"
    )
    parser.add_argument("--chunk-length", type=int, metavar="T", help="default: 8")
    parser.add_argument(
        "--compute-capabilities",
        nargs="+",
        metavar="CC",
        help="such as 8.6 8.9; default: the library's portable target",
    )
    parser.add_argument(
        "--profile", type=int, nargs=3, metavar=("MIN", "OPT", "MAX"), help="batch sizes B; default: 1 1 4096"
    )
    parser.add_argument("--parity-steps", type=int, metavar="N", help="default: 120000")
    return parser


def config_of(options: argparse.Namespace) -> BuildConfig | TargetConfig:
    """Raises BuildInputError for settings that make no sense."""
    from rfsq.export.engines import Profile

    given = {name: value for name, value in vars(options).items() if name not in ("verbose", "quiet", "json")}
    given |= {name: tuple(given[name]) for name in ("prefixes", "backends", "compute_capabilities") if name in given}
    if "profile" in given:
        given["profile"] = Profile(*given["profile"])
    if "from_bundle" in given:
        return _target_config(given)
    refuse_idle_choices(options)
    # Here, because a robot that adds engines has no torch.
    from rfsq.calibration.settings import ReadoutChoice
    from rfsq.export.build_config import BuildConfig
    from rfsq.export.plan import DeployMode

    fit = {name: given.pop(name) for name in ("classes", "vocabulary", "tokens", "order") if name in given}
    if fit:
        from rfsq.calibration.settings import ChunkConfig

        given["chunk"] = ChunkConfig(**fit)
    if "kind" in given:
        from rfsq.rfsq_ref.settings import TokenKind

        given["kind"] = TokenKind(given["kind"])
    if "readout" in given:
        given["readout"] = ReadoutChoice(given["readout"])
    if "conditioning" in given:
        given["conditioning"] = DeployMode(given["conditioning"])
    return BuildConfig(**given)


def _target_config(given: dict[str, Any]) -> TargetConfig:
    from rfsq.export.on_target import TargetConfig

    others = sorted(given.keys() - {"from_bundle", "backends", "profile"})
    if others:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise BuildInputError(f"{flags} cannot be changed in a bundle that is built; leave them out with --from-bundle")
    return TargetConfig(**{"bundle" if name == "from_bundle" else name: value for name, value in given.items()})


def _work(options: argparse.Namespace) -> Outcome:
    with _clean_ends():
        return _run(config_of(options), is_verbose=options.verbose)


def _run(config: BuildConfig | TargetConfig, *, is_verbose: bool) -> Outcome:
    from rfsq.export.on_target import TargetConfig, add_engines

    if isinstance(config, TargetConfig):
        try:
            manifest, added = add_engines(dataclasses.replace(config, has_details=is_verbose))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{config.bundle} is as it was") from None
        done = f"✓ {config.bundle} has validated engines for {', '.join(sorted({*added}))} here"
        return Outcome(done, {"bundle": str(config.bundle), **dataclasses.asdict(manifest)})
    import torch

    from rfsq.export.pipeline import build

    # For matrices this small more threads are slower.
    torch.set_num_threads(1)
    manifest = build(config, has_tables=is_verbose)
    return Outcome(verdict(config.folder, manifest), {"bundle": str(config.folder), **dataclasses.asdict(manifest)})


def verdict(output: Path, manifest: Manifest) -> str:
    """That the bundle is right, and what its tokens are worth."""
    lines = [f"✓ {output} is built and validated, fingerprint {manifest.fingerprint[:16]}"]
    if manifest.quality is not None:
        lines.append(f"what the tokens are worth: {manifest.quality.line}")
        worth, mode = manifest.quality.fidelity, manifest.model.mode
        lines += filter(None, [worth.clipping_in(mode), worth.warning_in(mode)])
    return "\n".join(lines)


@contextlib.contextmanager
def _clean_ends() -> Iterator[None]:
    """A build that the system tells to end cleans up after itself as one that fails does."""

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
