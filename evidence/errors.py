"""Errors of the evidence."""

from rfsq.rfsq_ref.errors import UnusableError


class EvidenceError(UnusableError):
    """Something cannot be compared as asked; the message says what to do."""
