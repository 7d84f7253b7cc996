"""The published model's calls on a bundle; implemented in `runtime/policy/adapter.py`."""

from .bundle.advice import install_package

try:
    from .policy.adapter import ActionRFSQAE
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError(
        f"the adapter needs torch, which is not installed; {install_package('torch')}", name="torch"
    ) from error

__all__ = ["ActionRFSQAE"]
