"""Are there wrong tokens among millions of steps? Holds the engines of a chunk bundle to the reference in float64.

    python -m tests.parity.steps build/chunk chunks.safetensors --steps 10000000 --processes 2

Every chunk is encoded by the reference, by the generated C and by ONNX Runtime. What they decode of all their tokens,
and of a part of them, is held to the reference, too. Chunks are those of a build's gates, other ones for each seed, in
any order: where --seconds end before the steps do, there are some of each kind. Prints a table. Exit status 1: a token
is wrong, or an action errs by more than DECODE_ERROR.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from rfsq.evidence.workers import results_of
from rfsq.export.chunk_plan import ACTION_LIMIT
from rfsq.export.chunk_reference import ChunkReference, episode_chunks
from rfsq.export.chunk_sections import chunk_sections
from rfsq.rfsq_ref.chunk_checkpoint import ChunkCheckpoint, load_chunk_checkpoint
from rfsq.rfsq_ref.data import load_demonstrations, split_episodes
from rfsq.rfsq_ref.fingerprint import chunk_fingerprint
from rfsq.runtime import ActionTokenizer
from rfsq.runtime.bundle.arrays import Float32Array, Int32Array
from rfsq.runtime.bundle.comparison import action_errors
from rfsq.runtime.bundle.console import aligned

BACKENDS = ("c", "onnxruntime")
#: Of tokens that an encoder gives, in normalised units.
DECODE_ERROR = 1e-6
#: Chunks that are judged at a time, and that the engines get at a time: what stays in a cache is encoded soonest.
_BATCH, _CALL = 2048, 64


@dataclass(frozen=True)
class Verdict:
    """What one backend makes of so many steps.

    num_different: chunks with another token than the reference's; wrong, near_ties: tokens of them; decode_error: the
    largest |action error| in normalised units; first_wrong: empty where none is.
    """

    backend: str
    num_steps: int = 0
    num_different: int = 0
    wrong: int = 0
    near_ties: int = 0
    decode_error: float = 0.0
    first_wrong: str = ""

    def __add__(self, other: Verdict) -> Verdict:
        return Verdict(
            self.backend,
            self.num_steps + other.num_steps,
            self.num_different + other.num_different,
            self.wrong + other.wrong,
            self.near_ties + other.near_ties,
            max(self.decode_error, other.decode_error),
            self.first_wrong or other.first_wrong,
        )

    @property
    def is_right(self) -> bool:
        return self.wrong == 0 and self.decode_error <= DECODE_ERROR


def judge_steps(
    checkpoint: ChunkCheckpoint, bundle: Path, num_steps: int, *, seed: int = 0, seconds: float = np.inf
) -> list[Verdict]:
    """Of at least so many steps, or as many as so many seconds allow: a verdict for each of BACKENDS.

    checkpoint: what the bundle was built of. Raises TokenizerError where a backend cannot be opened.
    """
    end = time.monotonic() + seconds
    reference = ChunkReference(checkpoint.model(dtype=torch.float64))
    model, sizes = reference.model, checkpoint.sizes
    sections = chunk_sections(model, _held_out(checkpoint), limit=ACTION_LIMIT, num_steps=num_steps, seed=seed)
    chunks = np.random.default_rng(seed).permutation(np.concatenate([section.actions for section in sections]))
    verdicts = [Verdict(name) for name in BACKENDS]
    fingerprint = chunk_fingerprint(checkpoint)
    tokenizers = [ActionTokenizer.load(bundle, backend=name, expect_fingerprint=fingerprint) for name in BACKENDS]
    for start in range(0, len(chunks), _BATCH):
        if time.monotonic() > end:
            break
        actions = chunks[start : start + _BATCH]
        with torch.no_grad():
            expected = model.encode(torch.from_numpy(actions).double()).numpy().astype(np.int32)
        length = 1 + start // _BATCH % sizes.num_tokens
        for place, tokenizer in enumerate(tokenizers):
            verdicts[place] += judged(reference, tokenizer, actions, expected, length)
    for tokenizer in tokenizers:
        tokenizer.close()
    return verdicts


def _held_out(checkpoint: ChunkCheckpoint) -> Float32Array:
    """Chunks of the validation episodes of the embedded demonstrations, if those were fitted to; else none."""
    dataset, sizes = load_demonstrations(), checkpoint.sizes
    if checkpoint.provenance.get("data", {}).get("sha256") != dataset.sha256:
        return np.empty((0, sizes.chunk_length, sizes.action_dim), np.float32)
    return episode_chunks(split_episodes(dataset).validation.episodes, sizes.chunk_length)


def judged(
    reference: ChunkReference, tokenizer: ActionTokenizer, actions: Float32Array, expected: Int32Array, length: int
) -> Verdict:
    """The verdict on one backend of chunks [N, T, A], whose reference's tokens are `expected` [N, L].

    length: of the part that is decoded beside the whole.
    """
    parts = range(0, len(actions), _CALL)
    found = np.concatenate([tokenizer.encode(actions[start : start + _CALL]) for start in parts])
    compared = reference.judge(actions, expected, found)
    errors = []
    for tokens in (found, np.ascontiguousarray(found[:, :length])):
        decoded = np.concatenate([tokenizer.decode(tokens[start : start + _CALL]) for start in parts])
        errors.append(action_errors(reference.decode(tokens), decoded, reference.model.units.numpy()).value)
    return Verdict(
        backend=tokenizer.backend.name,
        num_steps=actions[..., 0].size,
        num_different=int((found != expected).any(axis=1).sum()),
        wrong=compared.num_wrong,
        near_ties=compared.num_near_ties,
        decode_error=max(errors),
        first_wrong=str(compared.first_wrong or ""),
    )


# --- the command ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    checkpoint = load_chunk_checkpoint(options.checkpoint)
    share = -(-options.steps // options.processes)
    jobs = [
        (
            f"seed {seed}",
            partial(judge_steps, checkpoint, options.bundle, share, seed=seed, seconds=options.seconds),
        )
        for seed in range(options.seed, options.seed + options.processes)
    ]
    began = time.monotonic()
    found = results_of(jobs, options.processes, _one_thread)
    seconds = time.monotonic() - began
    verdicts = [sum(of_backend[1:], of_backend[0]) for of_backend in zip(*found, strict=True)]
    print(table(verdicts))
    steps = verdicts[0].num_steps
    print(f"{steps:,} steps in {seconds:.0f} s: {steps / seconds / options.processes:,.0f} a second and process")
    return 0 if all(verdict.is_right for verdict in verdicts) else 1


def table(verdicts: Sequence[Verdict]) -> str:
    heads = ("backend", "steps", "chunks that differ", "tokens wrong", "near-ties", "decode error", "first wrong token")
    rows = [
        (
            verdict.backend,
            f"{verdict.num_steps:,}",
            f"{verdict.num_different:,}",
            f"{verdict.wrong:,}",
            f"{verdict.near_ties:,}",
            f"{verdict.decode_error:.2g}",
            verdict.first_wrong or "none",
        )
        for verdict in verdicts
    ]
    return "\n".join(aligned([heads, *rows], is_ruled=True))


def _one_thread() -> None:
    torch.set_num_threads(1)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.parity.steps", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, help="folder of a bundle of chunk tokens")
    parser.add_argument("checkpoint", type=Path, help="the fit that it was built of")
    parser.add_argument("--steps", type=int, default=1_000_000, help="control steps, at least (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="each with a seed and a core of its own")
    parser.add_argument("--seconds", type=float, default=np.inf, help="judge what so many seconds allow")
    parser.add_argument("--seed", type=int, default=1, help="of the first process")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
