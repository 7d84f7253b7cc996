"""The parity gates: a backend, run through the very code that runs on the robot, against the float64 reference.

Graphs are checked before anything is compiled from them: their form, their shapes, and two runtimes that must agree.
The two are ONNX Runtime, through Polygraphy, and the reference evaluator of the onnx package: they share no code.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.logger import G_LOGGER

# Before Polygraphy opens ONNX Runtime: switches its telemetry off.
import rfsq.runtime.backends.onnxruntime  # noqa: F401
from rfsq.calibration.readout import held_out_warning
from rfsq.export.belief_vectors import belief_vectors
from rfsq.export.chunk_reference import ChunkReference
from rfsq.export.graph_builder import LinearForm
from rfsq.export.onnx_evaluator import onnx_evaluator
from rfsq.export.proving import failures
from rfsq.export.reference import AS_TRAINED, EDGES, REFITTED, Answers, Reference, Section
from rfsq.runtime.backends.belief_replay import judge_beliefs
from rfsq.runtime.backends.beliefs import decodes_beliefs, plain_question
from rfsq.runtime.backends.contract import Backend, judged
from rfsq.runtime.backends.graph_beliefs import graph_inputs
from rfsq.runtime.backends.refusal import judge_refusal
from rfsq.runtime.backends.replay import replay
from rfsq.runtime.bundle.arrays import Float32Array, Float64Array, Int32Array
from rfsq.runtime.bundle.comparison import TokenComparison, action_errors, std_error
from rfsq.runtime.bundle.console import ProgressLine, aligned
from rfsq.runtime.bundle.fidelity import Fidelity
from rfsq.runtime.bundle.gates import GATES, near_tie_cap
from rfsq.runtime.bundle.golden import Golden
from rfsq.runtime.bundle.golden_beliefs import BeliefCase
from rfsq.runtime.bundle.manifest import GraphEntry, ParityEntry
from rfsq.runtime.bundle.models import ModelEntry

_Arrays = Mapping[str, npt.NDArray[Any]]
#: Control steps judged at once: large enough to be fast, small enough that float64 margins stay in a few hundred MB.
_BATCH_STEPS = 8192
#: Control steps of each section that travel with the bundle as golden vectors; the edges travel whole.
_GOLDEN_STEPS = 192
#: Chunks whose beliefs are decoded by each backend.
_BELIEFS = 64
#: Chunks that a graph is run on at once. A call takes longest to begin, but of TensorRT's form a runtime that fuses
#: nothing holds every product: of one chunk of 26 dimensions, 16 steps and 64 classes, 34 MB.
_GRAPH_CHUNKS, _REDUCE_CHUNKS = 32, 8


def batches(reference: Reference | ChunkReference, sections: Sequence[Section]) -> Iterator[Answers]:
    """The reference's answers to every section, a few thousand steps at a time."""
    for section in sections:
        chunks = max(_BATCH_STEPS // section.actions.shape[1], 1)
        for start in range(0, len(section.actions), chunks):
            yield reference.answer(section.actions[start : start + chunks])


def golden_vectors(reference: Reference | ChunkReference, sections: Sequence[Section]) -> Golden:
    """What the robot replays: the first chunks of every section and all of the edges.

    But for chunks whose statistics float32 cannot give, in a `dynamic` model.
    """
    chunks = max(_GOLDEN_STEPS // sections[0].actions.shape[1], 1)
    parts = [section.actions if section.name == EDGES else section.actions[:chunks] for section in sections]
    answers = reference.answer(np.concatenate(parts))
    if answers.expected.stats is not None and not (kept := answers.has_float32_stats.all(-1)).all():
        answers = reference.answer(answers.expected.actions[kept])
    return reference.golden(answers.expected)


@dataclass
class Judge:
    """Collects what one backend, or a variant of it, gets wrong, batch by batch."""

    backend: Backend
    reference: Reference | ChunkReference
    model: ModelEntry
    variant: str
    seed: int
    found: list[TokenComparison] = field(default_factory=list)
    float32: list[TokenComparison] = field(default_factory=list)
    decode_errors: dict[str, float] = field(default_factory=dict)
    stats_error: float = 0.0
    num_steps: int = 0

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)

    def judge(self, answers: Answers) -> None:
        """Run the backend on one batch and keep the worst of every gate."""
        expected = answers.expected
        self.num_steps += expected.actions[..., 0].size
        tokens = np.empty_like(expected.tokens)
        stats = None if expected.stats is None else np.empty_like(expected.stats)
        self.backend.encode_into(expected.actions, tokens, stats)
        self.found.append(self.reference.judge(expected.actions, expected.tokens, tokens))
        self.float32.append(answers.float32)
        if stats is not None and expected.stats is not None:
            # Behind a flip the statistics are those of another residual.
            steady = ~(expected.tokens != tokens).any(axis=(-2, -1)) & answers.has_float32_stats
            self.stats_error = max(self.stats_error, action_errors(expected.stats[steady], stats[steady], 1.0).value)
        for prefix, rows, decoded in expected.decodings():
            part = None if expected.stats is None else np.ascontiguousarray(expected.stats[rows, ..., :prefix, :])
            given = np.ascontiguousarray(expected.tokens[rows, ..., :prefix])
            self._judge_decoding(given, part, decoded)
            # A policy may send tokens that no encoder gives.
            any_tokens = self._random.integers(self.model.vocabulary, size=given.shape, dtype=np.int32)
            self._judge_decoding(any_tokens, part, self.reference.decode(any_tokens, part))

    def _judge_decoding(self, tokens: Int32Array, stats: Float32Array | None, expected: Float64Array) -> None:
        decoder = self.model.decoder_of(tokens.shape[-1])
        found = np.empty(expected.shape, np.float32)
        self.backend.decode_into(tokens, stats, found)
        worst = action_errors(expected, found, self.model.action_units).value
        self.decode_errors[decoder] = max(self.decode_errors.get(decoder, 0.0), worst)

    def entries(self) -> tuple[ParityEntry, ...]:
        """One per gate; `value` above `limit` is a failure."""
        found, float32 = (functools.reduce(operator.add, parts) for parts in (self.found, self.float32))
        variant = f"{self.variant}, " if self.variant else ""

        def entry(gate: str, value: float, limit: float, detail: str = "") -> ParityEntry:
            return ParityEntry(
                self.backend.name, variant + gate, self.num_steps, value, limit, detail, self.backend.device
            )

        near_ties = f"L0 to L{self.model.depth - 1}: {_counts(found)}; torch float32: {_counts(float32)}"
        return (
            entry("encode: wrong tokens", found.num_wrong, GATES.wrong_tokens, str(found.first_wrong or "")),
            entry("encode: near-tie flips", found.num_near_ties, near_tie_cap(float32.num_near_ties), near_ties),
            *([entry("encode: stats error", self.stats_error, GATES.stats_error)] if self.model.has_stats else []),
            *(
                entry(f"decode {decoder}: action error", self.decode_errors[decoder], GATES.action_error)
                for decoder in self.model.decoders
                if decoder in self.decode_errors
            ),
            *(
                entry(check.gate, check.value, check.limit, check.detail)
                for check in judge_refusal(self.model, self.backend, is_thorough=True)
            ),
        )


def judges_of(
    backends: Sequence[Backend], reference: Reference | ChunkReference, model: ModelEntry, *, seed: int = 0
) -> list[Judge]:
    """One for every backend and each of its variants."""
    return [
        Judge(judged_backend, reference, model, variant, seed)
        for backend in backends
        for variant, judged_backend in judged(backend).items()
    ]


def _counts(comparison: TokenComparison) -> str:
    return " ".join(map(str, comparison.near_ties.tolist()))


def prove(
    model: ModelEntry,
    golden: Golden,
    reference: Reference | ChunkReference,
    sections: Sequence[Section],
    backends: Sequence[Backend],
) -> tuple[tuple[ParityEntry, ...], list[str]]:
    """Run the backends through all gates; a line for every red one."""
    judges = judges_of(backends, reference, model)
    total = sum(section.num_steps for section in sections)
    progress, done = ProgressLine(), 0
    for answers in batches(reference, sections):
        for judge in judges:
            judge.judge(answers)
        done += answers.expected.actions[..., 0].size
        progress.show(f"  parity gates: {done:,} of {total:,} steps")
    progress.clear()
    parity = tuple(entry for judge in judges for entry in judge.entries())
    parity += _belief_entries(model, golden, reference, backends)
    problems = failures(parity)
    for backend in backends:
        problems += [f"{backend.name}, golden vectors: {check}" for check in replay(golden, model, backend).failures]
    return parity, problems


def _belief_entries(
    model: ModelEntry, golden: Golden, reference: Reference | ChunkReference, backends: Sequence[Backend]
) -> tuple[ParityEntry, ...]:
    """The gates of beliefs, on more of them than travel with the bundle."""
    beliefs = belief_vectors(reference.model, model, golden.tokens, _BELIEFS, seed=1)
    if beliefs is None:
        return ()
    return tuple(
        ParityEntry(
            backend.name,
            check.gate,
            _BELIEFS * model.chunk_length,
            check.value,
            check.limit,
            check.detail,
            backend.device,
        )
        for backend in backends
        if decodes_beliefs(backend)
        for check in judge_beliefs(beliefs, model, backend, _BELIEFS)
    )


def closing_tables(
    parity: Sequence[ParityEntry], quality: Mapping[str, float], verdict: Fidelity | None, judged_on: str
) -> str:
    """quality: action MSE in normalised units, by what was decoded; both it and verdict of what `judged_on` names."""
    gates = [
        (
            f"{'✓' if entry.value <= entry.limit else '✗'} {entry.backend} ({entry.device}), {entry.gate}",
            f"{entry.value:.4g}",
            f"{entry.limit:.4g}",
            f"{entry.steps}",
        )
        for entry in parity
    ]
    parts = ["\n".join(aligned([("gate", "measured", "limit", "steps"), *gates], is_ruled=True))]
    parts += _details(parity)
    if quality:
        rows = [(name, f"{value:.3e}") for name, value in quality.items()]
        heads = (f"{judged_on}, decoded from", "action MSE, normalised units²")
        remark = (
            held_out_warning(quality[AS_TRAINED], quality.get(REFITTED), judged_on, "normalised units²")
            if AS_TRAINED in quality
            else ""
        )
        parts.append("\n".join((*aligned([heads, *rows], is_ruled=True), *filter(None, [remark]))))
    if verdict is not None:
        parts.append(verdict.table(f"{judged_on}, all layers"))
    return "\n" + "\n\n".join(parts)


def _details(parity: Sequence[ParityEntry]) -> list[str]:
    """The remarks of the gates, each with the engines that it concerns."""
    engines: dict[str, list[str]] = {}
    for entry in parity:
        if entry.detail:
            engines.setdefault(f"{entry.gate}: {entry.detail}", []).append(f"{entry.backend} ({entry.device})")
    return [f"{', '.join(names)}, {text}" for text, names in engines.items()]


# --- graphs -----------------------------------------------------------------------------------------------------------


def check_graph(entry: GraphEntry, onnx_bytes: bytes) -> list[str]:
    """Checker, strict shape inference, and the tensors that `entry` states; a line for everything that is wrong."""
    model = onnx.load_model_from_string(onnx_bytes)
    try:
        onnx.checker.check_model(model, full_check=True)
        graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return [f"{entry.file} is not a sound graph: {error}"]
    found = [_tensor(value) for value in (*graph.input, *graph.output)]
    expected = [(tensor.name, tensor.dtype, tensor.shape) for tensor in (*entry.inputs, *entry.outputs)]
    if found != expected or len(graph.input) != len(entry.inputs):
        return [f"{entry.file} has the tensors {found}; expected {expected}"]
    inferred = {value.name for value in (*graph.value_info, *graph.output)}
    unknown = [node.name for node in graph.node if set(node.output) - inferred]
    return [f"{entry.file}: shapes of {unknown} could not be inferred"] if unknown else []


def cross_check(entry: GraphEntry, onnx_bytes: bytes, golden: Golden, model: ModelEntry) -> list[str]:
    """Run the graph on two independent runtimes; a line for everything in which either leaves the reference."""
    evaluator = onnx_evaluator(onnx_bytes)
    session = SessionFromOnnx(onnx_bytes, providers=["cpu"])
    size = _REDUCE_CHUNKS if entry.form == LinearForm.REDUCE.value else _GRAPH_CHUNKS
    problems = []

    def evaluated(feed: _Feed) -> _Arrays:
        # What overflows is clipped behind that.
        with np.errstate(over="ignore"):
            return dict(zip(evaluator.output_names, evaluator.run(None, feed), strict=True))

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), OnnxrtRunner(session) as runtime:
        runs = {"ONNX Runtime": runtime.infer, "onnx reference evaluator": evaluated}
        for feed, disagreement in _trials(entry, golden, model):
            judged = ((name, disagreement(_in_parts(run, feed, size))) for name, run in runs.items())
            problems += [f"{entry.file} on {name}: {wrong}" for name, wrong in judged if wrong]
    return problems


_Feed = dict[str, npt.NDArray[Any]]


def _in_parts(run: Callable[[_Feed], _Arrays], feed: _Feed, size: int) -> _Feed:
    """What `run` makes of the feed, so many chunks at a time."""
    starts = range(0, len(next(iter(feed.values()))), size)
    parts = [run({name: array[start : start + size] for name, array in feed.items()}) for start in starts]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _trials(entry: GraphEntry, golden: Golden, model: ModelEntry) -> Iterator[tuple[_Feed, Callable[[_Arrays], str]]]:
    """What the graph is run on, and what says where its answers are wrong."""
    if entry.role == "belief":
        yield from _belief_trials(entry, golden, model)
        return
    for feed, expected in _feeds(entry, golden, model):
        yield feed, functools.partial(_disagreement, entry, golden, model, expected)


def _belief_trials(
    entry: GraphEntry, golden: Golden, model: ModelEntry
) -> Iterator[tuple[_Feed, Callable[[_Arrays], str]]]:
    for case in golden.beliefs.cases(model) if golden.beliefs is not None else ():
        if model.graph_of(case.prefix) == entry.prefix:
            question = plain_question(case.given, model, is_logits=True, keeps_mode=case.keeps_mode)
            inputs = graph_inputs(model, question)
            names = (tensor.name for tensor in entry.inputs)
            feed: _Feed = dict(zip(names, inputs.arrays, strict=True))
            yield feed, functools.partial(_belief_disagreement, case, model)


def _belief_disagreement(case: BeliefCase, model: ModelEntry, outputs: _Arrays) -> str:
    error = action_errors(case.actions, outputs["actions"], model.action_units)
    if not error.value <= GATES.action_error:
        return f"action error {error.value:g}, expected at most {GATES.action_error:g}: {error}"
    wrong = std_error(case.std, outputs["std"], model.action_units)
    return "" if wrong <= GATES.std_error else f"std error {wrong:g}, expected at most {GATES.std_error:g}"


def _feeds(entry: GraphEntry, golden: Golden, model: ModelEntry) -> Iterator[tuple[_Feed, Float64Array]]:
    """What the graph is run on, and what a decoder is to make of it."""
    if entry.role == "encoder":
        yield {"actions": golden.actions}, golden.decoded[model.depth]
        return
    for prefix, rows, expected in golden.decodings():
        if model.graph_of(prefix) == entry.prefix:
            feed: _Feed = {"tokens": np.ascontiguousarray(golden.tokens[rows, ..., :prefix])}
            if golden.stats is not None:
                feed["stats"] = np.ascontiguousarray(golden.stats[rows, ..., :prefix, :])
            yield feed, expected


def _disagreement(
    entry: GraphEntry, golden: Golden, model: ModelEntry, expected: Float64Array, outputs: _Arrays
) -> str:
    if entry.role == "encoder":
        compared = golden.compared(outputs["tokens"], model)
        if compared.num_wrong:
            return f"{compared.num_wrong} wrong tokens, first {compared.first_wrong}"
        if golden.stats is not None:
            # Behind a flip the statistics are those of another residual.
            steady = ~compared.flipped
            stats_error = action_errors(golden.stats[steady], outputs["stats"][steady], 1.0).value
            if not stats_error <= GATES.stats_error:
                return f"stats error {stats_error:g}, expected at most {GATES.stats_error:g}"
        return ""
    error = action_errors(expected, outputs["actions"], model.action_units)
    if error.value <= GATES.action_error:
        return ""
    return f"action error {error.value:g}, expected at most {GATES.action_error:g}: {error}"


def _tensor(value: onnx.ValueInfoProto) -> tuple[str, str, tuple[int, ...]]:
    """Name, dtype and shape in the words of a TensorEntry."""
    kind = value.type.tensor_type
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim)
    return value.name, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name, shape
