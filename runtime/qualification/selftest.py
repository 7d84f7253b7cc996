"""Replay a bundle's golden vectors on this machine: are the backend's answers those of the PyTorch reference?

Needs numpy and the backend alone. The exit status is 0 when every check passed, 1 when one failed, and 2 when nothing
could be checked: no bundle, an altered one, or no backend for it.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..backends.registry import PREFERENCE, create_backend
from ..backends.replay import replay
from ..bundle.console import printable
from ..bundle.errors import BackendUnavailableError, TokenizerError
from ..bundle.folder import Bundle, open_bundle
from ..bundle.golden import Golden, read_golden
from ..bundle.manifest import GOLDEN_NAME


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse_arguments(arguments)
    try:
        bundle = open_bundle(options.bundle)
        golden = read_golden(bundle.content(GOLDEN_NAME), bundle.manifest.model)
        num_bytes = sum(entry.size for entry in bundle.manifest.files.values())
        print(
            f"{bundle.folder}: {bundle.manifest.model.mode}, fingerprint {bundle.manifest.fingerprint}\n"
            f"✓ {len(bundle.manifest.files)} files, {num_bytes / 1e6:.1f} MB: sizes and sha256 as in the manifest"
        )
        if bundle.manifest.quality is not None:
            print(f"– what the tokens are worth, by the build: {printable(bundle.manifest.quality.line)}")
        if options.backend is not None:
            return 0 if _passes(options.backend, bundle, golden) else 1
        verdicts = _test_all(bundle, golden)
    except TokenizerError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0 if all(verdicts) else 1


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, help="folder written by `python export/build_engine.py`")
    parser.add_argument("--backend", choices=PREFERENCE, help="default: every backend that can be used here")
    return parser.parse_args(arguments)


def _test_all(bundle: Bundle, golden: Golden) -> list[bool]:
    """Raises BackendUnavailableError where no backend can be used at all."""
    verdicts = []
    for name in PREFERENCE:
        try:
            verdicts.append(_passes(name, bundle, golden))
        except BackendUnavailableError as error:
            print(f"– {name}: not tested: {printable(str(error))}")
    if not verdicts:
        raise BackendUnavailableError(f"no backend can be used for {bundle.folder} here; the lines above say why")
    return verdicts


def _passes(name: str, bundle: Bundle, golden: Golden) -> bool:
    start = time.perf_counter()
    with contextlib.closing(create_backend(name, bundle)) as backend:
        print(f"{name}: {backend.description}")
        result = replay(golden, bundle.manifest.model, backend)
    for check in result.checks:
        print(f"  {check}")
    steps = golden.actions.shape[0] * golden.actions.shape[1]
    taken = f"{len(result.checks)} checks on {steps} steps in {time.perf_counter() - start:.2f} s"
    if result.passed:
        print(f"✓ {name}: {taken}")
    else:
        print(f"✗ {name}: {len(result.failures)} of {taken} failed; do not use it, build the bundle again")
    return result.passed
