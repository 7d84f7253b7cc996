"""The bundle's table of contents: read strictly, written in one canonical form.

Unknown keys, missing keys and wrong types are refused, and the text must be exactly what writing its content again
would give. `manifest_sha256` covers all the rest, so no character of the file can change unnoticed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from dataclasses import dataclass
from typing import Any, Literal

from .errors import BundleError
from .fidelity import Fidelity
from .models import ChunkModel, ModelEntry, StepModel
from .paths import shown
from .reading import build, parse_json

SCHEMA_VERSION = 2
MANIFEST_NAME = "manifest.json"
GOLDEN_NAME = "golden.npz"
#: The constants of decoding, in bundles that decode beliefs; not in those that were built before there were any.
DECODING_NAME = "decoding.npz"

#: The generated C source of a bundle, from which its `c` engines are compiled.
C_HEADER, C_SOURCE = "engines/c/rfsq_tokenizer.h", "engines/c/rfsq_tokenizer.c"
#: The generated CUDA source, from which its `cuda` engines are compiled.
CUDA_SOURCE = "engines/cuda/rfsq_tokenizer.cu"

TokenType = Literal["int32", "uint8", "uint16"]
#: Types that tokens of CUDA kernels may have, by numpy's name, and their names in CUDA.
TOKEN_TYPES: dict[TokenType, str] = {"int32": "int", "uint8": "uint8", "uint16": "uint16"}
#: What -1, the mark of what is illegal, is in narrow types.
_MARKS: dict[TokenType, int] = {"uint8": 2**8 - 1, "uint16": 2**16 - 1}
#: Kernels for the few steps or chunks of a control loop, and for the many of data, where the sizes allow them.
KernelKind = Literal["few", "many"]
GraphRole = Literal["encoder", "decoder", "belief"]
#: Chunks that a block of the kernels for many takes at a time, of chunk tokens; a decoder's are of one class.
CHUNKS_OF_BLOCK: dict[GraphRole, int] = {"encoder": 8, "decoder": 64}
#: Chunks that are sorted by class together, before they are decoded.
CHUNKS_OF_WINDOW = 16384

GraphForm = Literal["gemm", "gemm_marked", "reduce"]
GRAPH_FORMS: tuple[GraphForm, ...] = typing.get_args(GraphForm)


@dataclass(frozen=True)
class TensorEntry:
    """dtype in numpy's words; shape with -1 for the batch, and for a number of chunk tokens that is not fixed."""

    name: str
    dtype: Literal["float32", "int32", "uint8", "uint16"]
    shape: tuple[int, ...]

    def shape_of(self, batch: int, num_tokens: int) -> tuple[int, ...]:
        """Its shape for so many chunks, each of so many tokens where their number is not fixed."""
        return (batch, *(num_tokens if size < 0 else size for size in self.shape[1:]))


@dataclass(frozen=True)
class GraphEntry:
    """An ONNX file; prefix: the layers l that a decoder takes, or the most chunk tokens; L for the encoder.

    A graph of the role `belief` decodes probabilities: there is one beside each decoder, in the forms `gemm` and
    `reduce`. Older bundles have them in `gemm` alone, or none at all, as those have whose tokens do not decode on their
    own.

    form: how the linear layers are written: `gemm` for ONNX Runtime on the CPU, `gemm_marked` for it on the GPU,
    `reduce` for TensorRT (`export/graph_builder.py` says why).
    """

    file: str
    role: GraphRole
    prefix: int
    form: GraphForm
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]

    @property
    def tokens(self) -> TensorEntry:
        return next(tensor for tensor in (*self.inputs, *self.outputs) if tensor.name == "tokens")

    @property
    def decodes(self) -> tuple[int, ...]:
        """The prefixes that a decoder takes."""
        return tuple(range(1, self.prefix + 1)) if self.tokens.shape[-1] < 0 else (self.prefix,)


@dataclass(frozen=True)
class EngineEntry:
    """An engine compiled from `source`, a graph or source code in the bundle.

    Runs only with this version of its library and, where targets are named, on those: compute capabilities of GPUs
    such as `8.9`, or the processor and its instructions such as `x86-64-v3`. profile: the smallest, tuned for and
    largest batch B. status: `validated` where the parity gates ran on it, on the GPU or the kind of processor `device`;
    `built` where it was inspected but could not be run, and device is empty; detail says more. precision: what the
    gates measured, not what was asked for. kernel_cache: a file with kernels that TensorRT-RTX compiled for `device`,
    or empty.
    """

    backend: str
    version: str
    targets: tuple[str, ...]
    source: str
    source_sha256: str
    file: str
    profile: tuple[int, int, int]
    status: Literal["validated", "built"]
    precision: Literal["fp32", "not measured"]
    device: str
    kernel_cache: str
    detail: str


@dataclass(frozen=True)
class ParityEntry:
    """What a gate measured: `value` against `limit` over `steps` control steps, on `device`."""

    backend: str
    gate: str
    steps: int
    value: float
    limit: float
    detail: str
    device: str

    def __post_init__(self) -> None:
        # A count is a number like any other to a gate, but JSON would spell it without a point.
        object.__setattr__(self, "value", float(self.value))
        object.__setattr__(self, "limit", float(self.limit))


@dataclass(frozen=True)
class QualityEntry:
    """What the tokens of all layers are worth, measured by the build.

    judged_on: which part of the data; source: their name; sha256: of all of them, episode borders included.
    """

    judged_on: str
    source: str
    sha256: str
    fidelity: Fidelity

    @property
    def line(self) -> str:
        """Grade and worst dimensions, and by what they are known."""
        return f"{self.fidelity.line}, on {self.fidelity.steps:,} steps of {self.source} ({self.judged_on})"


@dataclass(frozen=True)
class FileEntry:
    """sha256: 64 hexadecimal digits; size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """files: every file of the bundle but the manifest, by its path inside the bundle, with forward slashes.

    provenance: where checkpoint, constants and calibration data came from; free-form JSON. quality: None where the
    build had no data to judge by, or was made before builds recorded it.
    """

    schema_version: int
    fingerprint: str
    model: ChunkModel | StepModel
    graphs: tuple[GraphEntry, ...]
    engines: tuple[EngineEntry, ...]
    parity: tuple[ParityEntry, ...]
    tools: dict[str, str]
    provenance: dict[str, Any]
    files: dict[str, FileEntry]
    quality: QualityEntry | None = None

    def graph(self, role: GraphRole, prefix: int, form: GraphForm = "gemm") -> GraphEntry:
        """Raises BundleError where there is none."""
        for entry in self.graphs:
            if (entry.role, entry.prefix, entry.form) == (role, prefix, form):
                return entry
        raise BundleError(
            f"the bundle has no {role} for {prefix} {self.model.depth_unit} in the form {form!r}; build it again"
        )

    def graphs_of(self, form: GraphForm) -> tuple[GraphEntry, ...]:
        """The encoder, then the decoders, by ascending prefix."""
        decoders = (self.graph("decoder", prefix, form) for prefix in self.model.decoder_graphs)
        return (self.graph("encoder", self.model.depth, form), *decoders)

    def belief_graphs_of(self, form: GraphForm) -> tuple[GraphEntry, ...]:
        """Those that decode probabilities, by ascending prefix; none where the bundle has none of this form."""
        found = (entry for entry in self.graphs if (entry.role, entry.form) == ("belief", form))
        return tuple(sorted(found, key=lambda entry: entry.prefix))

    def every_graph_of(self, form: GraphForm) -> tuple[GraphEntry, ...]:
        """Those of `graphs_of`, then those of `belief_graphs_of`."""
        return (*self.graphs_of(form), *self.belief_graphs_of(form))


def graph_tensors(
    model: ModelEntry, role: GraphRole, prefix: int
) -> tuple[tuple[TensorEntry, ...], tuple[TensorEntry, ...]]:
    """Inputs and outputs that a graph of this model has, in this order."""
    actions = TensorEntry("actions", "float32", model.actions_shape(-1))
    if role == "belief":
        return _belief_inputs(model, prefix), (actions, TensorEntry("std", "float32", model.actions_shape(-1)))
    # A decoder of chunk tokens takes any number of them.
    is_any = role == "decoder" and isinstance(model, ChunkModel)
    codes = [TensorEntry("tokens", "int32", model.tokens_shape(-1, -1 if is_any else prefix))]
    if model.has_stats:
        codes.append(TensorEntry("stats", "float32", model.stats_shape(-1, prefix)))
    return ((actions,), tuple(codes)) if role == "encoder" else (tuple(codes), (actions,))


def _belief_inputs(model: ModelEntry, prefix: int) -> tuple[TensorEntry, ...]:
    if isinstance(model, ChunkModel):
        classes = TensorEntry("classes", "float32", (-1, model.num_classes))
        return classes, TensorEntry("bits", "float32", (-1, 2, model.belief_columns))
    return (TensorEntry("probabilities", "float32", (*model.tokens_shape(-1, prefix), model.vocabulary)),)


def token_types(vocabulary: int, narrow: TokenType = "uint8") -> tuple[TokenType, ...]:
    """Types of tokens of CUDA kernels: int32, and a narrow one that holds every value beside the mark of what is
    illegal. narrow: uint8 for per-step tokens, uint16 for chunk tokens."""
    return ("int32", narrow) if vocabulary <= _MARKS[narrow] else ("int32",)


def kernel_name(prefix: int | None, token_type: str, kind: KernelKind) -> str:
    """What the generator of a CUDA kernel and the backend that launches it call it. prefix: None for the encoder."""
    role = "encode" if prefix is None else f"decode_l{prefix}"
    return f"{role}_{token_type}_{kind}"


#: How a call of a kernel of beliefs takes what is given: bits of its terms. Blocks of chunk tokens wait for others, and
#: take turns where not all of them run at once.
IS_LOGITS, KEEPS_MODE, TAKES_TURNS = 1, 2, 4
#: Bytes before the first slot of what blocks of chunk tokens tell each other.
BELIEF_HEADER_BYTES = 16


def belief_kernel_name(form: int | Literal["words", "bits"], slot_bytes: int = 0) -> str:
    """What they call the kernel that decodes beliefs. form: the prefix of per-step tokens, or what is given of chunk
    tokens.

    slot_bytes: see `belief_slot_bytes`; in the name, as sizes are in that of `sorter_name`.
    """
    return f"decode_beliefs_l{form}" if isinstance(form, int) else f"decode_beliefs_{form}_{slot_bytes}"


def belief_slot_bytes(num_values: int, num_classes: int, num_bits: int) -> int:
    """Of the GPU's memory that blocks use to tell each other of a chunk: its bits, and what each class decodes to.

    num_values: T * A; num_classes: C; num_bits: of all tokens.
    """

    def padded(count: int) -> int:
        return -(-count // 4) * 4

    return 4 * (4 + padded(num_bits) + 2 * num_classes * padded(num_values))


def sorter_name(prefix: int, token_type: str) -> str:
    """What they call the kernel that sorts chunks by class for a decoder of many.

    Its sizes are in the name: no engine that was made for others gets a workspace of these.
    """
    return f"{kernel_name(prefix, token_type, 'many')}_sort_{CHUNKS_OF_WINDOW}_{CHUNKS_OF_BLOCK['decoder']}"


def tiles_of_window(num_classes: int) -> int:
    """At most: the last one of a class may not be full."""
    return CHUNKS_OF_WINDOW // CHUNKS_OF_BLOCK["decoder"] + num_classes


def bytes_of_window(num_classes: int) -> int:
    """Of `Window`, of the generated CUDA: a count, a word for each tile and 16 bits for each chunk."""
    return 4 + 4 * tiles_of_window(num_classes) + 2 * CHUNKS_OF_WINDOW


def manifest_text(manifest: Manifest) -> str:
    """The one spelling of a manifest, its own hash included."""
    content = dataclasses.asdict(manifest)
    if manifest.quality is None:
        # As older builds spelled it.
        del content["quality"]
    body = json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({**content, "manifest_sha256": digest}, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def parse_manifest(text: str) -> Manifest:
    """Raises BundleError, saying what is wrong where, unless `text` is what `manifest_text` wrote."""
    try:
        content = parse_json(text)
    except ValueError as error:
        raise BundleError(f"{MANIFEST_NAME} is not JSON: {error}; copy the bundle again or build it again") from error
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
        found = content.get("schema_version") if isinstance(content, dict) else type(content).__name__
        raise BundleError(
            f"{MANIFEST_NAME} has schema version {shown(found)}; this runtime reads {SCHEMA_VERSION}: build the "
            "bundle again with this version, or install the version that wrote it"
        )
    stated = content.pop("manifest_sha256", None)
    try:
        manifest = build(Manifest, content, MANIFEST_NAME, is_exact=True)
    except ValueError as error:
        raise BundleError(f"{error}; build the bundle again") from error
    try:
        canonical = manifest_text(manifest)
    except ValueError as error:
        # Numbers that overflow to infinity, halves of surrogate pairs: JSON that the build never writes.
        raise BundleError(f"{MANIFEST_NAME} holds what no build writes: {error}; build the bundle again") from error
    if canonical != text:
        raise BundleError(
            f"{MANIFEST_NAME} was altered after it was written: its manifest_sha256 is {shown(stated)}, or its "
            "spelling is not the one written by the build; copy the bundle again or build it again"
        )
    return manifest
