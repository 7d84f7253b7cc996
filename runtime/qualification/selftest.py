"""Replay a bundle's golden vectors on this machine: are the backend's answers those of the PyTorch reference?

Needs numpy and the backend alone.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..bundle.command import DONE, WANTING, CommandParser, Outcome, run
from ..bundle.console import printable
from ..bundle.errors import BackendUnavailableError
from ..bundle.paths import counted

if TYPE_CHECKING:
    from ..backends.contract import Backend
    from ..backends.replay import ReplayResult
    from ..bundle.folder import Bundle
    from ..bundle.golden import Golden


def main(arguments: Sequence[str] | None = None) -> int:
    return run(_parser(), _work, arguments)


def _parser() -> CommandParser:
    parser = CommandParser("selftest", wanting="a backend gives other answers than the reference")
    parser.add_bundle()
    parser.add_backend("every one that can be used here", has_auto=False)
    return parser


def _work(options: argparse.Namespace) -> Outcome:
    from ..backends.registry import PREFERENCE, create_backend, no_gpu_said_first, without_gpu_as_one
    from ..bundle.folder import open_bundle
    from ..bundle.golden import read_golden
    from ..bundle.manifest import GOLDEN_NAME

    bundle = open_bundle(options.bundle)
    golden = read_golden(bundle.content(GOLDEN_NAME), bundle.manifest.model)
    _introduce(bundle, is_verbose=options.verbose)
    found: dict[str, dict[str, Any]] = {}
    for name in (options.backend,) if options.backend else PREFERENCE:
        try:
            with no_gpu_said_first(options.backend), contextlib.closing(create_backend(name, bundle)) as backend:
                found[name] = _tested(backend, bundle, golden, is_verbose=options.verbose)
        except BackendUnavailableError as error:
            if options.backend:
                raise
            found[name] = {"status": "not tested", "reason": str(error)}
    passed, failed = ([name for name in found if found[name]["status"] == status] for status in ("passed", "failed"))
    if not passed + failed:
        reasons = "\n".join(f"  {name}: {facts['reason']}" for name, facts in found.items())
        raise BackendUnavailableError(f"no backend can be used for {bundle.folder} here\n{reasons}")
    document = {"bundle": str(bundle.folder), "fingerprint": bundle.manifest.fingerprint, "backends": found}
    untested = {name: facts["reason"] for name, facts in found.items() if facts["status"] == "not tested"}
    for name, reason in (untested if options.verbose else without_gpu_as_one(untested)).items():
        print(f"– {name}: not tested: {printable(reason)}")
    if failed:
        verdict = f"✗ {', '.join(failed)}: not the reference's answers; do not use it, build the bundle again"
        return Outcome(verdict, document, WANTING)
    return Outcome(f"✓ {', '.join(passed)}: the reference's answers", document, DONE)


def _introduce(bundle: Bundle, *, is_verbose: bool) -> None:
    # Here, because it needs numpy, which `--help` does not.
    from ..bundle.fidelity import Grade

    manifest = bundle.manifest
    print(f"{bundle.folder}: {manifest.model.mode}, fingerprint {manifest.fingerprint}")
    if is_verbose:
        num_bytes = sum(entry.size for entry in manifest.files.values())
        print(f"✓ {len(manifest.files)} files, {num_bytes / 1e6:.1f} MB: sizes and sha256 as in the manifest")
    if manifest.quality is not None and (is_verbose or manifest.quality.fidelity.grade is not Grade.GOOD):
        print(f"– what the tokens are worth, by the build: {printable(manifest.quality.line)}")


def _tested(backend: Backend, bundle: Bundle, golden: Golden, *, is_verbose: bool) -> dict[str, Any]:
    """What is to be said of one backend, after a line has said it."""
    from ..backends.replay import replay

    start = time.perf_counter()
    result = replay(golden, bundle.manifest.model, backend)
    seconds = time.perf_counter() - start
    if is_verbose:
        print(f"{backend.name}: {backend.description}")
        print("\n".join(f"{backend.name}: {check}" for check in result.checks))
    print(_line(backend.name, result, golden, seconds))
    return {
        "status": "passed" if result.passed else "failed",
        "description": backend.description,
        "seconds": seconds,
        "checks": [{**dataclasses.asdict(check), "passed": check.passed} for check in result.checks],
    }


def _line(name: str, result: ReplayResult, golden: Golden, seconds: float) -> str:
    steps = counted(golden.actions.shape[0] * golden.actions.shape[1], "step")
    taken = f"{counted(len(result.checks), 'check')} on {steps} in {seconds:.2f} s"
    if result.passed:
        return f"✓ {name}: {taken}"
    return f"✗ {name}: {len(result.failures)} of {taken} failed, the first: {str(result.failures[0])[2:]}"
