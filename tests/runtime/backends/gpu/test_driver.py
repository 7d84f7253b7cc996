"""What another thread does to a capture: one that it spoils is made again."""

from types import SimpleNamespace
from typing import Any

import pytest

from rfsq.runtime.bundle.errors import InferenceError

pytest.importorskip("cuda.bindings", reason="cuda-python is not installed: pip install '.[gpu]'")
from rfsq.runtime.backends.gpu import driver

OK, SPOILT = driver.cudart.cudaError_t.cudaSuccess, driver.cudart.cudaError_t.cudaErrorStreamCaptureInvalidated
STREAM: Any = SimpleNamespace(handle=7)


class Captures:
    """Stands for CUDA, whose captures are spoilt a few times."""

    def __init__(self, spoilt: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = self.ended = 0
        for name, function in (
            ("cudaStreamBeginCapture", self.begin),
            ("cudaStreamEndCapture", lambda _stream: self.end(spoilt)),
            ("cudaGraphInstantiate", lambda graph, _flags: (OK, f"of {graph}")),
            ("cudaGraphDestroy", lambda _graph: (OK,)),
            ("cudaGetLastError", lambda: (OK,)),
        ):
            monkeypatch.setattr(driver.cudart, name, function)

    def begin(self, stream: int, _mode: object) -> tuple[Any]:
        assert stream == STREAM.handle
        assert self.begun == self.ended
        self.begun += 1
        return (OK,)

    def end(self, spoilt: int) -> tuple[Any, str]:
        self.ended += 1
        return (SPOILT if self.ended <= spoilt else OK), f"graph {self.ended}"


def test_a_capture_that_another_thread_spoils_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, runs = Captures(3, monkeypatch), []

    def work() -> None:
        runs.append(cuda.begun)
        if cuda.begun == 2:
            raise InferenceError("so does CUDA answer on a stream whose capture was spoilt")

    assert driver.capture(STREAM, work)._executable == "of graph 4"
    assert runs == [1, 2, 3, 4]


def test_one_that_is_spoilt_again_and_again_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Captures(1000, monkeypatch)
    with pytest.raises(InferenceError, match="other threads wait for the whole GPU"):
        driver.capture(STREAM, lambda: None)
    assert cuda.begun == cuda.ended == driver._CAPTURES


@pytest.mark.parametrize("error", [InferenceError("no memory"), KeyboardInterrupt()])
def test_what_fails_for_itself_is_tried_once_and_ended(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Captures(0, monkeypatch)

    def work() -> None:
        raise error

    with pytest.raises(type(error)):
        driver.capture(STREAM, work)
    assert cuda.begun == cuda.ended == 1
