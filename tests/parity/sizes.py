"""Do chunk models of all sizes hold? Builds and judges a table of them on the generated C and ONNX Runtime.

    python -m tests.parity.sizes [--only 3 7] [--steps 2000]

Each model is built as `export/build_engine.py` does, through all of its gates, and opened as a robot does. Then every
number of tokens is decoded and held to the reference in float64, what is no token is refused, a control loop takes a
draft and then the whole chunk, and the bundle tells its tokenizer from another. Some models are random, some are fitted
to smooth motions, with a dimension that never moves and a gripper. Prints a line for each. Exit status 1: one fails.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from rfsq.calibration.chunk_fitting import fit_chunk_tokens
from rfsq.calibration.settings import ChunkConfig
from rfsq.export import engines
from rfsq.export.build_config import BuildConfig
from rfsq.export.chunk_reference import ChunkReference
from rfsq.export.pipeline import build
from rfsq.rfsq_ref.chunk_checkpoint import ChunkCheckpoint, load_chunk_checkpoint, save_chunk_checkpoint
from rfsq.rfsq_ref.chunk_code import ChunkSizes
from rfsq.rfsq_ref.data import ActionDataset
from rfsq.rfsq_ref.fingerprint import chunk_fingerprint
from rfsq.runtime import ActionTokenizer, Status
from rfsq.runtime.backends.cpu_targets import host_targets
from rfsq.runtime.bundle.comparison import action_errors
from rfsq.runtime.bundle.console import aligned
from rfsq.runtime.bundle.errors import FingerprintError, InvalidInputError
from rfsq.runtime.bundle.gates import GATES
from tests.calibration.test_chunk import smooth_episodes
from tests.chunk_bundles import ChunkRecipe, chunk_checkpoint, random_chunks
from tests.parity.steps import BACKENDS, DECODE_ERROR
from tests.runtime.control.loops import Clock, loop

_CHUNKS, _REPEATS = 24, 200


@dataclass(frozen=True)
class Case:
    """A model: random, or fitted to smooth motions. units: of a fit's actions, so that `auto` normalises them."""

    sizes: ChunkSizes
    is_fitted: bool = False
    has_normaliser: bool = False

    def __str__(self) -> str:
        sizes = self.sizes
        kind = "fitted" if self.is_fitted else "random"
        words = f"A {sizes.action_dim}, T {sizes.chunk_length}, V {2**sizes.token_bits}, C {sizes.num_classes}"
        return f"{words}, L {sizes.num_tokens}, {kind}{', normalised' if self.has_normaliser else ''}"

    def checkpoint(self) -> ChunkCheckpoint:
        if not self.is_fitted:
            found = chunk_checkpoint(ChunkRecipe(self.sizes, has_normaliser=self.has_normaliser))
            constants = found.constants
            # As a fit does: no more latents than the bits can name.
            named = min(self.sizes.code_bits, constants.scale.shape[1])
            constants = replace(
                constants,
                basis=constants.basis[..., :named],
                # So small that classes hold what lies near their means, and not all is clipped and sent in escape.
                scale=constants.scale[:, :named] * 0.2,
                gain=constants.gain[:, :named],
                order=constants.order % named,
            )
            return replace(found, constants=constants)
        sizes = self.sizes
        episodes = [episode.astype(np.float32) for episode in smooth_episodes(sizes.action_dim, [150] * 24, seed=1)]
        for episode in episodes:
            episode[:, 0] = 0.25
            episode[:, 1:-1] *= 20 if self.has_normaliser else 1
        names = tuple(str(number) for number in range(len(episodes)))
        dataset = ActionDataset(tuple(episodes), names, ("",) * len(episodes), "smooth motions")
        config = ChunkConfig(sizes.chunk_length, sizes.num_classes, 2**sizes.token_bits, sizes.num_tokens)
        return fit_chunk_tokens(dataset, config)


def _sizes(action_dim: int, chunk_length: int, vocabulary: int, num_classes: int, num_tokens: int) -> ChunkSizes:
    return ChunkSizes(action_dim, chunk_length, num_classes, vocabulary.bit_length() - 1, num_tokens)


#: Corners, and every pair of a number of dimensions, steps, words and classes; one class is that and escape.
TABLE = (
    Case(_sizes(2, 1, 256, 2, 4)),
    Case(_sizes(2, 1, 4096, 256, 3), has_normaliser=True),
    Case(_sizes(2, 8, 1024, 15, 20), has_normaliser=True),
    Case(_sizes(2, 16, 256, 64, 40)),
    Case(_sizes(2, 32, 1024, 2, 45), is_fitted=True),
    Case(_sizes(7, 1, 1024, 64, 12)),
    Case(_sizes(7, 8, 256, 256, 60), has_normaliser=True),
    Case(_sizes(7, 16, 4096, 2, 12)),
    Case(_sizes(7, 32, 256, 15, 120), has_normaliser=True),
    Case(_sizes(7, 8, 4096, 64, 40), is_fitted=True, has_normaliser=True),
    Case(_sizes(14, 1, 256, 2, 25), has_normaliser=True),
    Case(_sizes(14, 8, 4096, 64, 12)),
    Case(_sizes(14, 16, 1024, 256, 2)),
    Case(_sizes(14, 32, 4096, 15, 30), is_fitted=True, has_normaliser=True),
    Case(_sizes(26, 1, 4096, 15, 39), has_normaliser=True),
    Case(_sizes(26, 8, 1024, 2, 256)),
    Case(_sizes(26, 16, 256, 15, 50), has_normaliser=True),
    Case(_sizes(26, 16, 1024, 64, 80), is_fitted=True),
    Case(_sizes(26, 32, 1024, 15, 60), is_fitted=True, has_normaliser=True),
    Case(_sizes(26, 32, 256, 256, 2)),
    Case(_sizes(26, 32, 4096, 64, 3), has_normaliser=True),
)


@dataclass(frozen=True)
class Line:
    """What was found of one model: num_latents M; tokens that are wrong, near-ties, over so many steps, and the largest
    error of encoded tokens, of both backends; microseconds of C, called from Python."""

    num_latents: int
    num_steps: int
    wrong: int
    near_ties: int
    decode_error: float
    encode_us: float
    decode_us: float


def build_and_judge(case: Case, folder: Path, num_steps: int) -> Line:
    """Raises GateError where a gate is red, AssertionError where something else is not as it is to be."""
    file, output = folder / "chunk.safetensors", folder / "bundle"
    save_chunk_checkpoint(case.checkpoint(), file)
    checkpoint = load_chunk_checkpoint(file)
    # C for the best target alone: the others take as long again.
    with mock.patch.object(engines, "host_targets", return_value=host_targets()[:1]):
        config = BuildConfig(checkpoint=file, output=output, backends=BACKENDS, parity_steps=num_steps)
        manifest = build(config, has_tables=False)
    with ActionTokenizer.load(output, backend="c") as tokenizer:
        check_that_classes_and_escape_are_sent(checkpoint.sizes, tokenizer.golden.tokens[:, 0])
    gates = {(entry.backend, entry.gate): entry.value for entry in manifest.parity}
    counts = [
        int(sum(gates[name, f"encode: {gate}"] for name in BACKENDS)) for gate in ("wrong tokens", "near-tie flips")
    ]
    return Line(
        checkpoint.constants.scale.shape[1], manifest.parity[0].steps, *counts, *judge_bundle(checkpoint, output)
    )


def judge_bundle(checkpoint: ChunkCheckpoint, bundle: Path) -> tuple[float, float, float]:
    """The largest |action error| of encoded tokens, and microseconds of C for a chunk, encoded and decoded."""
    reference = ChunkReference(checkpoint.model(dtype=torch.float64))
    fingerprint = chunk_fingerprint(checkpoint)
    with pytest.raises(FingerprintError):
        ActionTokenizer.load(bundle, backend="c", expect_fingerprint=fingerprint[::-1])
    errors, microseconds = [], (0.0, 0.0)
    for name in BACKENDS:
        with ActionTokenizer.load(bundle, backend=name, expect_fingerprint=fingerprint) as tokenizer:
            errors.append(check_every_number_of_tokens(reference, tokenizer))
            check_what_is_no_token(tokenizer)
            check_a_control_loop(reference, tokenizer)
            if name == "c":
                microseconds = _timed(tokenizer, reference)
    return max(errors), *microseconds


def check_that_classes_and_escape_are_sent(sizes: ChunkSizes, first_tokens: np.ndarray) -> None:
    """Where escape alone is sent, no gate has judged a class."""
    is_escape = first_tokens >> (sizes.token_bits - sizes.class_bits) >= sizes.escape
    assert set(is_escape.tolist()) == {False, True}


def check_every_number_of_tokens(reference: ChunkReference, tokenizer: ActionTokenizer) -> float:
    """Of any tokens, some of them escape's, and of encoded ones; returns the largest error of those."""
    model, units = reference.model, reference.model.units.numpy()
    random, sizes = np.random.default_rng(0), reference.model.sizes
    any_tokens = random.integers(2**sizes.token_bits, size=(_CHUNKS, sizes.num_tokens), dtype=np.int32)
    any_tokens[::4, 0] |= sizes.escape << (sizes.token_bits - sizes.class_bits)
    # A class encodes what it has decoded; nearly all else is sent in escape where the model is random.
    chunks = np.concatenate((random_chunks(model, _CHUNKS), reference.decode(any_tokens).astype(np.float32)))
    encoded = tokenizer.encode(chunks)
    worst = 0.0
    assert tokenizer.prefixes == tuple(range(1, sizes.num_tokens + 1))
    for length in tokenizer.prefixes:
        for tokens, limit in ((any_tokens, GATES.action_error), (encoded, DECODE_ERROR)):
            part = np.ascontiguousarray(tokens[:, :length])
            error = action_errors(reference.decode(part), tokenizer.decode(part), units)
            assert error.value <= limit, (tokenizer.backend.name, length, error)
        worst = max(worst, error.value)
    return worst


def check_what_is_no_token(tokenizer: ActionTokenizer) -> None:
    depth, vocabulary = tokenizer.model.depth, tokenizer.model.vocabulary
    tokens = np.zeros((2, depth), np.int32)
    for foreign in (-1, vocabulary, 2**31 - 1):
        for place in {0, depth - 1}:
            wrong = tokens.copy()
            wrong[1, place] = foreign
            with pytest.raises(InvalidInputError, match=f"is {foreign}; expected 0 ... {vocabulary - 1}"):
                tokenizer.decode(wrong)
    for missing in (tokens[:, :0], np.hstack((tokens, tokens)), tokens[0]):
        with pytest.raises(InvalidInputError):
            tokenizer.decode(missing)


def check_a_control_loop(reference: ChunkReference, tokenizer: ActionTokenizer) -> None:
    """The whole chunk takes the place of its draft."""
    sizes = reference.model.sizes
    tokens = tokenizer.encode(random_chunks(reference.model, 1))
    free, clock = {"max_relative_step": (float("inf"),) * sizes.action_dim}, Clock()
    with loop(tokenizer, clock=clock, **free) as decoder:
        decoder.warmup()
        for step, count in enumerate((1, sizes.num_tokens)[: sizes.chunk_length]):
            clock.now += round(decoder.config.period_s * 1e9)
            part = np.ascontiguousarray(tokens[:, :count])
            result = decoder.step(part, sequence=1)
            assert (result.status, result.sequence) == (Status.OK, 1)
            np.testing.assert_array_equal(result.actions, tokenizer.decode(part)[0, step])


def _timed(tokenizer: ActionTokenizer, reference: ChunkReference) -> tuple[float, float]:
    actions = random_chunks(reference.model, 1)
    tokens, decoded = tokenizer.encode(actions), np.empty_like(actions)

    def least(call: Callable[[], None]) -> float:
        found = []
        for _ in range(_REPEATS):
            began = time.perf_counter_ns()
            call()
            found.append(time.perf_counter_ns() - began)
        return min(found) / 1000

    return least(lambda: tokenizer.encode_into(actions, tokens)), least(lambda: tokenizer.decode_into(tokens, decoded))


# --- the command ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    torch.set_num_threads(1)
    heads = ("model", "M", "steps", "wrong", "near-ties", "decode error", "C encode µs", "C decode µs", "s")
    rows, failed = [heads], 0
    for place in options.only or range(len(TABLE)):
        case, began = TABLE[place], time.monotonic()
        try:
            with tempfile.TemporaryDirectory() as folder:
                found = build_and_judge(case, Path(folder), options.steps)
        except Exception:  # every case is to be tried, and what is wrong with this one to be seen
            traceback.print_exc()
            failed += 1
            values = ["failed"] * 7
        else:
            counts = (found.num_latents, found.num_steps, found.wrong, found.near_ties)
            times = (found.encode_us, found.decode_us)
            values = [*(f"{count:,}" for count in counts), f"{found.decode_error:.1e}", *(f"{us:.1f}" for us in times)]
        rows.append((f"{place}: {case}", *values, f"{time.monotonic() - began:.0f}"))
        print(" | ".join(rows[-1]), flush=True)
    print("\n" + "\n".join(aligned(rows, is_ruled=True)))
    return 1 if failed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.parity.sizes", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help=f"of the table, 0 to {len(TABLE) - 1}")
    parser.add_argument("--steps", type=int, default=2000, help="control steps of the gates, at least")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
