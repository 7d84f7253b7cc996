"""Errors of the evidence."""


class EvidenceError(ValueError):
    """Something cannot be compared as asked; the message says what to do."""
