"""What a build deploys: a tokenizer of either kind, what is generated from it, and what it is judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rfsq.export.c_source import CTokenizer
from rfsq.export.chunk_reference import ChunkReference
from rfsq.export.errors import require_none
from rfsq.export.graph_builder import LinearForm
from rfsq.export.parity import check_graph
from rfsq.export.reference import Reference, Section
from rfsq.export.sources import BuildData
from rfsq.runtime.bundle.decoding import Decoding
from rfsq.runtime.bundle.manifest import GraphEntry, GraphRole, graph_tensors
from rfsq.runtime.bundle.models import ChunkModel, ModelEntry, StepModel


class Deployable(Protocol):
    """fingerprint: of what the tokens mean; provenance: where it comes from, for the manifest."""

    @property
    def reference(self) -> Reference | ChunkReference: ...

    @property
    def data(self) -> BuildData: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def model(self) -> StepModel | ChunkModel: ...

    @property
    def provenance(self) -> Mapping[str, Any]: ...

    def graphs(self) -> Sequence[tuple[GraphEntry, bytes]]:
        """Encoder and decoders in every form, and decoders of probabilities, checked. Raises GateError where one is not
        sound."""

    def decoding(self) -> Decoding | None:
        """The constants of the decoder, for code that differentiates through it; None where tokens do not decode
        alone."""

    def c_source(self) -> CTokenizer: ...

    def cuda_source(self) -> str: ...

    def sections(self, num_steps: int) -> tuple[Section, ...]:
        """What gates are run on: so many control steps or more."""

    def keep_fit(self, folder: Path) -> None:
        """Of a build into this folder that fails: save what took long to fit, if anything did, and say where."""


def checked_graph(
    model: ModelEntry, role: GraphRole, prefix: int, form: LinearForm, content: bytes
) -> tuple[GraphEntry, bytes]:
    """A graph and its entry. Raises GateError where it is not sound."""
    is_whole = prefix == model.depth
    file = f"{role}.onnx" if is_whole else f"{role}_l{prefix}.onnx"
    path = file if form is LinearForm.GEMM else f"{form.value}/{file}"
    graph = GraphEntry(path, role, prefix, form.value, *graph_tensors(model, role, prefix))
    require_none(check_graph(graph, content))
    return graph, content
