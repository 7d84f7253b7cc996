"""A step of training as one CUDA graph: launching its small kernels one by one takes longer than what they do."""

from collections.abc import Callable

import torch

#: Before a recording: libraries make their buffers in these.
_STEPS_BEFORE = 3


def recorded(step: Callable[[], None]) -> Callable[[], None]:
    """What does on the GPU what `step` does: on the same tensors, which is where it reads and writes.

    `step` runs a few times first, and must not wait for the GPU.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_STEPS_BEFORE):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Torch's own stream of recordings stays on the device that was the first to record.
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay
