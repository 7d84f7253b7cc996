"""The published model's calls on a bundle; where it stands is `runtime/policy/adapter.py`."""

from .policy.adapter import ActionRFSQAE

__all__ = ["ActionRFSQAE"]
