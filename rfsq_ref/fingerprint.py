"""The identity of a tokenizer: two with the same fingerprint give the same tokens and, of all layers, the same actions.

From a prefix of the layers too, except that a `recovered` decoder of a prefix is a fit of its own.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict

from torch import Tensor

from rfsq.rfsq_ref.checkpoints import Checkpoint
from rfsq.rfsq_ref.chunk_checkpoint import ChunkCheckpoint
from rfsq.runtime.bundle.modes import StepMode

_SCHEME, _CHUNK_SCHEME = "rfsq-fingerprint-1", "rfsq-chunk-fingerprint-1"


def fingerprint(checkpoint: Checkpoint, mode: StepMode) -> str:
    """SHA-256 over grid, sizes, mode, weights, fitted constants and normaliser, as 64 hexadecimal digits.

    Chunk length and precision do not count: they change neither what a token means nor how it is decoded. Nor do the
    decoders of prefixes: which are built is a choice of the bundle, and a policy keeps its tokens when one is added or
    fitted anew.
    """
    tensors: dict[str, Tensor] = dict(checkpoint.weights)
    if mode == "calibrated":
        fitted = checkpoint.tensors().items()
        tensors |= {name: tensor for name, tensor in fitted if name.startswith(("calibrated.", "readout."))}
    if mode == "recovered":
        full_depth = checkpoint.recovered[checkpoint.config.num_layers]
        tensors |= {"recovered.matrix": full_depth.matrix, "recovered.offset": full_depth.offset}
    header = {
        "scheme": _SCHEME,
        "mode": mode,
        "config": asdict(checkpoint.config),
        "normaliser": checkpoint.normaliser.to_json() if checkpoint.normaliser else None,
        "tensors": _described(tensors),
    }
    return _digest(header, tensors)


def chunk_fingerprint(checkpoint: ChunkCheckpoint) -> str:
    """SHA-256 over sizes, budgets, constants and normaliser of chunk tokens, as 64 hexadecimal digits.

    Budgets and weights count, since classes are chosen by them: other tokens may come of the same chunk.
    """
    tensors = checkpoint.tensors()
    header = {
        "scheme": _CHUNK_SCHEME,
        "sizes": asdict(checkpoint.sizes),
        "budgets": list(checkpoint.constants.budgets),
        "normaliser": checkpoint.normaliser.to_json() if checkpoint.normaliser else None,
        "tensors": _described(tensors),
    }
    return _digest(header, tensors)


def _described(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, list[int]]]:
    return {name: (str(tensor.dtype), list(tensor.shape)) for name, tensor in tensors.items()}


def _digest(header: Mapping[str, object], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        array = tensors[name].detach().contiguous().numpy()
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()
