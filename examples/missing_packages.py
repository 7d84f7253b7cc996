"""What an example says where a package is missing that this project advises to install."""

import sys
from types import TracebackType

from rfsq.runtime.bundle.command import UNUSABLE, explanation
from rfsq.runtime.bundle.console import printable


def explain_missing_packages() -> None:
    """For a script, before its imports: a missing package ends it with status 2."""

    def end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        advice = explanation(error)
        if not advice:
            sys.__excepthook__(kind, error, trace)
            return
        print(printable(advice), file=sys.stderr)
        # Raised from here, it is what the process ends with.
        raise SystemExit(UNUSABLE)

    sys.excepthook = end
