"""What every backend has to stand that may be called from a signal handler."""

import signal

import numpy as np

from rfsq.runtime import ActionTokenizer


def check_decoding_in_signal_handlers(tokenizer: ActionTokenizer) -> None:
    """A handler decodes while its own thread is in the middle of decoding; every answer is right."""
    tokens, out = np.zeros((1, 2, 4, 3), np.int32), np.empty((1, 2, 3), np.float32)
    expected, handled = tokenizer.decode(tokens), 0

    def handle(*_arguments: object) -> None:
        nonlocal handled
        tokenizer.decode_into(tokens, out)
        handled += 1

    previous = signal.signal(signal.SIGALRM, handle)
    try:
        for delay in np.random.default_rng(0).uniform(1e-6, 6e-5, 2000):
            signal.setitimer(signal.ITIMER_REAL, delay)
            np.testing.assert_array_equal(tokenizer.decode(tokens), expected)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert handled > 100
    np.testing.assert_array_equal(out, expected)
