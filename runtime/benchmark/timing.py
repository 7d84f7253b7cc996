"""Latency figures: many calls, timed in turns so that a noisy second of the machine affects all figures alike.

Those of a tokenizer go from numpy to numpy.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..bundle.arrays import Codes, Float32Array, Float64Array
from ..bundle.errors import TokenizerError
from ..bundle.models import ChunkModel, ModelEntry, StepModel
from ..bundle.paths import counted
from ..tokenizer import ActionTokenizer, codes_of

#: How many calls of each figure a round times; fewer of slow calls, so that a figure takes `_ROUND_US` at most.
CALLS_PER_ROUND = 100
_ROUND_US = 50e3
#: How long a figure takes in a round at most, with the calls that are not timed.
ROUND_SECONDS = 1.1 * _ROUND_US / 1e6
#: A percentile is given if at least so many calls lie above it; otherwise it would be the maximum or chance.
_LEAST_ABOVE = 1

#: The backend of figures that copy one large array of the GPU: they become a bandwidth, not rows.
BANDWIDTH = "bandwidth"
#: Ends the backend's name in figures of another bundle, whose calls are timed in turn with those of the first.
BESIDE = " beside"
#: The backend of figures that do nothing but fused multiply-adds: they become a rate, not rows.
ARITHMETIC = "fp32 arithmetic"

#: `host`: numpy to numpy, checked, as a robot's program calls it; `unchecked`: the same without the checks; `device`:
#: arrays that lie on the GPU, launch and synchronisation included; `floor`: what no call can do without.
CallPath = Literal["host", "unchecked", "device", "floor"]


@dataclass(frozen=True)
class Figure:
    """A call that is timed, and the floor that it is compared with.

    take: times that many warm calls, float64 [calls] in microseconds; floor: the `operation` of the figure of path
    `floor` and of the same batch that bounds this one; bytes_in, bytes_out: what a call reads and writes; operations:
    in float32, where a fused multiply-add counts as two; compared: the operation of the same backend, path and batch
    that this one does more than.
    """

    backend: str
    operation: str
    path: CallPath
    batch: int
    take: Callable[[int], Float64Array]
    floor: str = ""
    bytes_in: int = 0
    bytes_out: int = 0
    operations: int = 0
    compared: str = ""

    @property
    def label(self) -> str:
        return f"{self.backend}, {self.operation}, {self.path}, batch {self.batch}"


@dataclass(frozen=True)
class Row:
    """A figure as measured, in microseconds over all calls of all rounds.

    jitter: p99 - p50. A percentile that too few calls cannot give is None, and so is the jitter. times_floor: p50 over
    the floor's p50; times_beside: over that of the same call of the bundle beside; times_decode: over that of decoding
    tokens, of what decodes distributions. steps_per_second: control steps, from p50. bandwidth_share: the time that
    the call's bytes need at the measured copy bandwidth, over p50. roofline_share: the same for the bytes, or for the
    operations at the measured rate if they take longer.
    """

    backend: str
    operation: str
    path: CallPath
    batch: int
    calls: int
    p50: float
    p90: float | None
    p99: float | None
    p999: float | None
    max: float
    jitter: float | None
    floor: str = ""
    times_floor: float | None = None
    times_beside: float | None = None
    times_decode: float | None = None
    steps_per_second: float | None = None
    bandwidth_share: float | None = None
    roofline_share: float | None = None


@dataclass(frozen=True)
class Bandwidth:
    """The bandwidth of copies of one large array, timed in turn with the calls at `batch`.

    way: such as `host to device` (pinned memory); bytes_per_second: within the GPU both read and written bytes count.
    """

    way: str
    batch: int
    bytes_per_second: float


@dataclass(frozen=True)
class Arithmetic:
    """The rate of fused multiply-adds in float32, two operations each, timed in turn with the calls at `batch`."""

    batch: int
    operations_per_second: float


def time_calls(call: Callable[[], object], calls: int) -> Float64Array:
    """The microseconds of each of `calls` calls, float64 [calls]; a tenth as many go before and are not timed."""
    for _ in range(calls // 10 + 1):
        call()
    taken = np.empty(calls)
    for index in range(calls):
        start = time.perf_counter_ns()
        call()
        taken[index] = (time.perf_counter_ns() - start) / 1e3
    return taken


def measure(
    figures: Sequence[Figure], rounds: int, on_round: Callable[[int], None] = lambda _round: None
) -> tuple[dict[Figure, Float64Array], dict[str, str]]:
    """The microseconds of all calls of each figure, timed in turns; and why the others failed, by label."""
    failed: dict[str, str] = {}
    calls: dict[Figure, int] = {}
    taken: dict[Figure, list[Float64Array]] = {}
    for number in range(rounds):
        on_round(number)
        for figure in figures:
            if figure.label in failed:
                continue
            try:
                if figure not in calls:
                    calls[figure] = _calls_per_round(figure)
                taken.setdefault(figure, []).append(figure.take(calls[figure]))
            except TokenizerError as error:
                failed[figure.label] = str(error)
    return {f: np.concatenate(parts) for f, parts in taken.items() if f.label not in failed}, failed


def _calls_per_round(figure: Figure) -> int:
    # By the fastest of a few: one slow call must not leave a figure with few calls.
    once = float(figure.take(3).min())
    return int(np.clip(_ROUND_US / max(once, 1e-3), 1, CALLS_PER_ROUND))


def summarise(taken: Mapping[Figure, Float64Array], chunk_length: int) -> list[Row]:
    """A row for each figure in their order, compared with its floor if that was measured."""
    medians = {figure: float(np.median(samples)) for figure, samples in taken.items()}
    floors = {(figure.operation, figure.batch): p50 for figure, p50 in medians.items() if figure.path == "floor"}
    calls = {(figure.backend, figure.operation, figure.path, figure.batch): p50 for figure, p50 in medians.items()}
    bandwidths = {(found.way, found.batch): found.bytes_per_second / 1e6 for found in bandwidths_of(taken)}
    rates = {found.batch: found.operations_per_second / 1e6 for found in arithmetic_of(taken)}
    rows = []
    for figure, samples in taken.items():
        if figure.backend in (BANDWIDTH, ARITHMETIC):
            continue
        p50, p99 = medians[figure], percentile(samples, 99)
        floor = floors.get((figure.floor, figure.batch))
        beside = calls.get((figure.backend + BESIDE, figure.operation, figure.path, figure.batch))
        decode = calls.get((figure.backend, figure.compared, figure.path, figure.batch))
        share, roofline = _bandwidth_share(figure, p50, bandwidths), None
        if figure.path == "device" and share is not None and figure.operations and figure.batch in rates:
            roofline = max(share, figure.operations / rates[figure.batch] / p50)
        rows.append(
            Row(
                backend=figure.backend,
                operation=figure.operation,
                path=figure.path,
                batch=figure.batch,
                calls=len(samples),
                p50=p50,
                p90=percentile(samples, 90),
                p99=p99,
                p999=percentile(samples, 99.9),
                max=float(samples.max()),
                jitter=None if p99 is None else p99 - p50,
                floor="" if floor is None else figure.floor,
                times_floor=None if floor is None else p50 / floor,
                times_beside=None if beside is None else p50 / beside,
                times_decode=None if decode is None else p50 / decode,
                steps_per_second=None if figure.path == "floor" else figure.batch * chunk_length / p50 * 1e6,
                bandwidth_share=share,
                roofline_share=roofline,
            )
        )
    return rows


def bandwidths_of(taken: Mapping[Figure, Float64Array]) -> list[Bandwidth]:
    """The bandwidths among the figures."""
    found = _medians(taken, BANDWIDTH)
    return [Bandwidth(figure.operation, figure.batch, figure.bytes_in / p50 * 1e6) for figure, p50 in found]


def arithmetic_of(taken: Mapping[Figure, Float64Array]) -> list[Arithmetic]:
    """The rates of arithmetic among the figures."""
    return [Arithmetic(figure.batch, figure.operations / p50 * 1e6) for figure, p50 in _medians(taken, ARITHMETIC)]


def _medians(taken: Mapping[Figure, Float64Array], backend: str) -> list[tuple[Figure, float]]:
    return [(figure, float(np.median(samples))) for figure, samples in taken.items() if figure.backend == backend]


def _bandwidth_share(figure: Figure, p50: float, bandwidths: Mapping[tuple[str, int], float]) -> float | None:
    if figure.path == "device":
        copies = {"device to device": figure.bytes_in + figure.bytes_out}
    elif figure.floor:
        # Both directions can be under way at once.
        copies = {"host to device": figure.bytes_in, "device to host": figure.bytes_out}
    else:
        return None
    if not all((way, figure.batch) in bandwidths for way in copies):
        return None
    return max(num_bytes / bandwidths[way, figure.batch] for way, num_bytes in copies.items()) / p50


def percentile(samples: Float64Array, percent: float) -> float | None:
    """numpy's percentile of float64 [calls]; None if there are too few calls for it."""
    # Rounded, because 100 - 99.9 is not a tenth in binary.
    if round(len(samples) * (100 - percent) / 100, 6) < _LEAST_ABOVE:
        return None
    return float(np.percentile(samples, percent))


# --- the calls of a tokenizer from numpy to numpy, and their data -----------------------------------------------------


@dataclass(frozen=True, eq=False)
class Batch:
    """B random chunks within the model's range, float32 [B, T, A], and what they are encoded to."""

    actions: Float32Array
    codes: Codes

    @property
    def size(self) -> int:
        return len(self.actions)


def random_batch(tokenizer: ActionTokenizer, size: int) -> Batch:
    """A batch of B = size chunks: always the same actions, and the tokens that the backend makes of them.

    Of chunk tokens those that random tokens decode to: no class holds random actions, and hardly any chunk of a robot
    takes as long to encode.
    """
    model, random = tokenizer.model, np.random.default_rng(0)
    if model.token_grid:
        normalised = random.uniform(-1, 1, model.actions_shape(size))
        actions = (normalised * model.action_units + model.action_offset).astype(np.float32)
    else:
        actions = tokenizer.decode(random.integers(model.vocabulary, size=model.tokens_shape(size), dtype=np.int32))
    return Batch(actions, codes_of(tokenizer, actions))


def operation_name(model: ModelEntry, prefix: int | None) -> str:
    """`encode` for None, `decode` for all layers or tokens, `decode l3` for three layers, `decode 8 tokens`."""
    if prefix is None:
        return "encode"
    if prefix == model.depth:
        return "decode"
    return f"decode {counted(prefix, 'token')}" if isinstance(model, ChunkModel) else f"decode l{prefix}"


def host_figures(tokenizer: ActionTokenizer, batch: Batch, *, has_copies: bool) -> Iterator[Figure]:
    """Encoding and `key_prefixes`, checked and unchecked.

    has_copies: whether the arrays travel to a GPU and back.
    """
    model, backend = tokenizer.model, tokenizer.backend
    encoded: list[Any] = [None if array is None else np.empty_like(array) for array in batch.codes]
    decoded = np.empty_like(batch.actions)
    paths: tuple[CallPath, ...] = ("host", "unchecked")
    for path, prefix in itertools.product(paths, (None, *reversed(model.key_prefixes))):
        codes = batch.codes.prefix(prefix or model.depth)
        sizes = [batch.actions.nbytes, sum(array.nbytes for array in codes if array is not None)]
        if prefix is None:
            encode = tokenizer.encode_into if path == "host" else backend.encode_into
            call = functools.partial(encode, batch.actions, *encoded)
        else:
            sizes.reverse()
            call = (
                functools.partial(tokenizer.decode_into, codes.tokens, decoded, codes.stats)
                if path == "host"
                else functools.partial(backend.decode_into, *codes, decoded)
            )
        operation = operation_name(model, prefix)
        floor = copies_name(operation) if has_copies else ""
        take = functools.partial(time_calls, call)
        yield Figure(backend.name, operation, path, batch.size, take, floor, bytes_in=sizes[0], bytes_out=sizes[1])


def operations_of(model: ModelEntry, prefix: int | None) -> int:
    """Operations in float32 for one step, a fused multiply-add being two; prefix: None for encoding.

    Counted as generated code does them: 8 for Mish, 20 for tanh, 5 for each token that is encoded.
    """
    if isinstance(model, ChunkModel):
        return _chunk_operations(model, prefix)
    assert isinstance(model, StepModel)  # there are no others
    action_dim, latent_dim, width = model.action_dim, model.latent_dim, model.hidden_width
    layers = 2 * width * (action_dim + latent_dim) + 8 * width
    if prefix is None:
        return layers + 20 * latent_dim + 5 * latent_dim * model.depth
    tokens = 2 * latent_dim * prefix
    # A recovered decoder has a weight of every token for every latent.
    return layers + tokens * (latent_dim if model.mode == "recovered" else 1)


def _chunk_operations(model: ChunkModel, prefix: int | None) -> int:
    """Of one step; encoding tries every class. 20 for tanh and atanh, 5 for each cell, 2 for each bit."""
    values, latents = model.chunk_length * model.action_dim, model.num_latents
    if prefix is not None:
        return (2 * values * latents + 20 * latents + 2 * model.token_bits * prefix) // model.chunk_length
    trial = 2 * values * latents + latents * (20 + 25 * len(model.budgets))
    return (model.num_classes - 1) * trial // model.chunk_length


def copies_name(operation: str) -> str:
    """The floor of a call that brings arrays to the GPU and back."""
    return f"copies of {operation}"
