"""What a build is asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from rfsq.calibration.settings import ChunkConfig, ReadoutChoice
from rfsq.export.engines import Profile
from rfsq.export.errors import BuildInputError
from rfsq.export.plan import DeployMode
from rfsq.rfsq_ref.own_format import token_kind
from rfsq.rfsq_ref.settings import TokenKind, check_positive
from rfsq.runtime.bundle.backend_specs import BACKENDS, compiled_from

#: Far beyond any policy's chunks; the golden vectors of longer ones would take a robot seconds to load.
_LONGEST_CHUNK = 1024
#: Hours of work on any machine, and a number that arrays are counted in.
_MOST_PARITY_STEPS = 10**9


_FOLDERS = {TokenKind.STEP: Path("build/bundle"), TokenKind.CHUNK: Path("build/chunk")}
#: Settings that a kind of tokens has no use for.
_UNUSED = {TokenKind.CHUNK: ("conditioning", "use_layernorm", "weights", "readout", "prefixes")}


@dataclass(frozen=True)
class BuildConfig:
    """What to build.

    kind: None for that of the checkpoint, or per-step tokens; checkpoint: None for the embedded one, or for chunk
    tokens that are fitted to the data, as `chunk` says. output: None for build/bundle, or
    build/chunk of chunk tokens; chunk_length: None for 8.
    prefixes: None for 3 where the model has as many layers, and L; backends: None for ONNX Runtime, on the GPU too
    where it can, every TensorRT that is installed, and C where there is a compiler; conditioning: None for
    `calibrated` with a robust checkpoint and `none` with a naive one; use_layernorm: for files that do not say it;
    weights: the model in a checkpoint that holds several; normaliser: a JSON file, or for a fit of chunk tokens a
    choice of `ChunkNormaliser`.
    """

    kind: TokenKind | None = None
    checkpoint: Path | None = None
    output: Path | None = None
    overwrite: bool = False
    conditioning: DeployMode | None = None
    use_layernorm: bool | None = None
    weights: str | None = None
    normaliser: Path | None = None
    data: Path | None = None
    key: str | None = None
    filter_key: str | None = None
    readout: ReadoutChoice = ReadoutChoice.AUTO
    prefixes: tuple[int, ...] | None = None
    chunk_length: int | None = None
    chunk: ChunkConfig | None = None
    backends: tuple[str, ...] | None = None
    compute_capabilities: tuple[str, ...] = ()
    profile: Profile = field(default_factory=Profile)
    parity_steps: int = 120_000

    def __post_init__(self) -> None:
        check_positive(self, "parity_steps", error=BuildInputError)
        if self.chunk_length is not None:
            check_positive(self, "chunk_length", error=BuildInputError)
        if self.chunk_length is not None and self.chunk_length > _LONGEST_CHUNK:
            raise BuildInputError(f"chunk_length is {self.chunk_length}; expected at most {_LONGEST_CHUNK} steps")
        if self.parity_steps > _MOST_PARITY_STEPS:
            raise BuildInputError(f"parity_steps is {self.parity_steps}; expected at most {_MOST_PARITY_STEPS}")
        wrong = [name for name in self.compute_capabilities if not re.fullmatch(r"\d+\.\d", name)]
        if wrong:
            raise BuildInputError(f"compute capabilities {wrong} are none; expected numbers such as 8.9")
        tuned = compiled_from("graphs")
        if self.compute_capabilities and self.backends is not None and not set(self.backends) & set(tuned):
            raise BuildInputError(
                f"compute capabilities {list(self.compute_capabilities)} are for {' and '.join(tuned)}, "
                f"and only {', '.join(self.backends)} is asked for; leave one of the two flags out"
            )
        unknown = set(self.backends or ()) - BACKENDS.keys()
        if unknown:
            raise BuildInputError(f"backends {sorted(unknown)} are not known; there are {', '.join(BACKENDS)}")

    @cached_property
    def folder(self) -> Path:
        """Where the bundle is to be. Raises as `token_kind`."""
        return self.output or _FOLDERS[self.token_kind]

    @cached_property
    def token_kind(self) -> TokenKind:
        """The kind that is asked for, or that of the checkpoint.

        Raises CheckpointError where there is none, BuildInputError where settings of the other kind are given.
        """
        kind = self.kind
        if kind is None:
            kind = TokenKind.STEP if self.checkpoint is None else token_kind(self.checkpoint)
        unused = {name for name in _UNUSED.get(kind, ()) if getattr(self, name) != getattr(BuildConfig, name)}
        if kind is TokenKind.STEP:
            _refuse(self._of_fit(), "kind 'step'")
        elif self.checkpoint is not None:
            others = {name for name in ("chunk_length", "normaliser") if getattr(self, name) is not None}
            _refuse(self._of_fit() | others, "a fit that is done")
        _refuse(unused, f"kind {kind.value!r}")
        return kind

    def _of_fit(self) -> set[str]:
        """Settings of a fit of chunk tokens that are given."""
        chosen, default = self.chunk or ChunkConfig(), ChunkConfig()
        return {name for name in vars(default) if getattr(chosen, name) != getattr(default, name)}


def _refuse(settings: set[str], what: str) -> None:
    """Raise BuildInputError where there are any. what: it that does not use them."""
    if settings:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(settings))
        raise BuildInputError(f"{flags} given, which {what} does not use; drop it")
