"""Bundles in policies of torch: `policy/adapter.py` has the published model's calls, `policy/chunk_adapter.py` those of
chunk tokens."""

from .bundle.advice import install_package

try:
    from .policy.adapter import ActionRFSQAE
    from .policy.chunk_adapter import ChunkTokenizer
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError(
        f"the adapter needs torch, which is not installed; {install_package('torch')}", name="torch"
    ) from error

__all__ = ["ActionRFSQAE", "ChunkTokenizer"]
