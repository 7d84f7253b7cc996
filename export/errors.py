"""Errors of the export: each message says what was found, what was expected and what to do next."""


class ExportError(RuntimeError):
    """A build that cannot go on; nothing is left behind at the output."""
