#!/usr/bin/env python3
"""What users of the published model run today, timed for `runtime/bench.py --peers`, which starts this process.

Says in one line of JSON what it can run, then answers each line `INDEX CALLS` with the microseconds of so many calls,
or with a text where they fail. The model is the published one, weights of the embedded checkpoint where the sizes are
its own, else random: time does not depend on them.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rfsq.rfsq_ref.autoencoder import ModelConfig
from rfsq.rfsq_ref.checkpoints import ROBUST_CHECKPOINT, load_checkpoint
from rfsq.rfsq_ref.quantizer import SIGMA_EPSILON

EAGER, COMPILED = "torch eager", "torch.compile"
_Call = Callable[[Tensor], Tensor]


class PublishedModel(nn.Module):
    """The published operations one by one, as research code spells them: argmin over distances, a loop over layers.

    `rfsq_ref` gives the same tokens by another, faster way, which would flatter the peer.
    """

    grid: Tensor

    def __init__(self, config: ModelConfig, *, is_robust: bool) -> None:
        super().__init__()
        self.num_layers, self.is_robust = config.num_layers, is_robust
        self.encoder = nn.Sequential(
            nn.Linear(config.action_dim, config.hidden_width),
            nn.Mish(),
            nn.Linear(config.hidden_width, config.latent_dim),
            nn.Tanh(),
        )
        self.decoder = nn.Sequential(
            nn.Linear(config.latent_dim, config.hidden_width),
            nn.Mish(),
            nn.Linear(config.hidden_width, config.action_dim),
        )
        self.register_buffer("grid", torch.linspace(-1, 1, config.num_levels), persistent=False)

    def encode(self, actions: Tensor) -> Tensor:
        """actions [B, T, A] -> tokens int64 [B, T, D, L]."""
        return self._quantize(self.encoder(actions))[1]

    def decode(self, tokens: Tensor) -> Tensor:
        """tokens [B, T, D, l] -> actions [B, T, A], by the published `decode_from_indices`."""
        latents: Any = 0
        for layer in range(tokens.shape[-1]):
            latents = latents + self.grid[tokens[..., layer]]
        actions: Tensor = self.decoder(latents)
        return actions

    def _quantize(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """With what training alone needs: the published `encode` computes it and drops it."""
        residual, total = latents, torch.zeros_like(latents)
        codes = []
        for _ in range(self.num_layers):
            normed = residual
            if self.is_robust:
                mean = residual.mean(dim=-1, keepdim=True)
                std = residual.std(dim=-1, keepdim=True) + SIGMA_EPSILON
                normed = (residual - mean) / std
            index = torch.argmin(torch.abs(normed.unsqueeze(-1) - self.grid), dim=-1)
            quantized = self.grid[index]
            if self.is_robust:
                quantized = quantized * std + mean
            total = total + quantized
            residual = residual - quantized
            codes.append(index)
        return latents + (total - latents).detach(), torch.stack(codes, dim=-1)


@dataclass(frozen=True, eq=False)
class PeerFigure:
    """prefix: None for encoding. call: one use, finished when it returns."""

    peer: str
    prefix: int | None
    path: Literal["host", "device"]
    batch: int
    on_gpu: bool
    bytes_in: int
    bytes_out: int
    call: Callable[[], object]


def main() -> None:
    # Whatever libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    request = json.loads(sys.argv[1])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # One core, like our own backend on the CPU.
    torch.set_num_threads(1)
    model, remark = published_model(request)
    unavailable: dict[str, str] = {}
    with torch.no_grad():
        figures = list(peer_figures(model.to(device), request, device, unavailable))
        offered = {
            "versions": {"torch": torch.__version__},
            "figures": [_described(figure) for figure in figures],
            "unavailable": unavailable,
            "remarks": [
                remark,
                f"torch runs on {_described_device(device)}; its tokens are int64, twice the bytes of ours",
            ],
        }
        print(json.dumps(offered), file=answers)
        for line in sys.stdin:
            index, calls = map(int, line.split())
            try:
                answer: list[float] | str = time_calls(figures[index].call, calls)
            except RuntimeError as error:
                answer = f"{figures[index].peer} failed: {error}"
            print(json.dumps(answer), file=answers)


def published_model(sizes: Mapping[str, Any]) -> tuple[PublishedModel, str]:
    """The model of the bundle's sizes, and whose weights it has."""
    names = ("action_dim", "latent_dim", "hidden_width", "num_layers", "num_levels")
    config = ModelConfig(**{name: sizes[name] for name in names})
    model = PublishedModel(config, is_robust=sizes["mode"] != "none").eval().requires_grad_(False)
    checkpoint = load_checkpoint(ROBUST_CHECKPOINT)
    if checkpoint.config != config:
        return model, "the peers' model has the bundle's sizes and random weights: no embedded checkpoint has its sizes"
    model.load_state_dict(dict(checkpoint.weights))
    return model, "the peers' model is the embedded robust checkpoint, of the bundle's sizes"


def peer_figures(
    model: PublishedModel, request: Mapping[str, Any], device: torch.device, unavailable: dict[str, str]
) -> Iterator[PeerFigure]:
    """Every peer that works here; the others are named in `unavailable`, with the reason."""
    yield from _figures(EAGER, model.encode, model.decode, model, request, device)
    if device.type != "cuda":
        unavailable[COMPILED] = "torch finds no GPU, and what is compared here is its captured CUDA graph"
        return
    options: dict[str, Any] = {"fullgraph": True, "dynamic": False}
    try:
        import torch._dynamo

        # Each prefix and batch is compiled for itself; the default is to give up after 8.
        torch._dynamo.config.recompile_limit = 64
        encode, decode = torch.compile(model.encode, **options), torch.compile(model.decode, **options)
        yield from list(_figures(COMPILED, encode, decode, model, request, device))
    except Exception as error:  # Whatever the compiler, its own compilers and CUDA raise
        unavailable[COMPILED] = f"{type(error).__name__}: {str(error).splitlines()[0]}"


def _figures(
    peer: str, encode: _Call, decode: _Call, model: PublishedModel, request: Mapping[str, Any], device: torch.device
) -> Iterator[PeerFigure]:
    for batch in request["batches"]:
        shape = (batch, request["chunk_length"], request["action_dim"])
        actions = torch.empty(shape).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
        tokens = model.encode(actions.to(device)).cpu()
        for prefix in (None, *reversed(request["prefixes"])):
            function, source = (encode, actions) if prefix is None else (decode, tokens[..., :prefix].contiguous())
            result = tokens if prefix is None else actions
            # Captured by hand: a compiled function that captures itself spends ten times as long on its guards.
            ways = _captured_ways if peer == COMPILED else _ways
            for path, call in ways(function, source, device):
                for _ in range(5):
                    call()
                yield PeerFigure(peer, prefix, path, batch, device.type == "cuda", source.nbytes, result.nbytes, call)


def _ways(
    function: _Call, source: Tensor, device: torch.device
) -> Iterator[tuple[Literal["host", "device"], Callable[[], object]]]:
    if device.type != "cuda":
        yield "host", lambda: function(source)
        return
    on_gpu = source.to(device)

    def on_device() -> None:
        function(on_gpu)
        torch.cuda.synchronize()

    yield "host", lambda: function(source.to(device)).cpu()
    yield "device", on_device


def _captured_ways(
    function: _Call, source: Tensor, device: torch.device
) -> Iterator[tuple[Literal["host", "device"], Callable[[], object]]]:
    on_gpu = source.to(device)
    # Compiles, on a stream of its own as torch asks for before a capture.
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function(on_gpu)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function(on_gpu)

    def on_host() -> None:
        on_gpu.copy_(source)
        graph.replay()
        result.cpu()

    def on_device() -> None:
        graph.replay()
        torch.cuda.synchronize()

    yield "host", on_host
    yield "device", on_device


def time_calls(call: Callable[[], object], calls: int) -> list[float]:
    """Microseconds of each call, after a tenth as many that are not timed, as `runtime/benchmark/timing.py` does it."""
    for _ in range(calls // 10 + 1):
        call()
    taken = []
    for _ in range(calls):
        start = time.perf_counter_ns()
        call()
        taken.append((time.perf_counter_ns() - start) / 1e3)
    return taken


def _described_device(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "one core of the CPU, like onnxruntime here"


def _described(figure: PeerFigure) -> dict[str, Any]:
    names = ("peer", "prefix", "path", "batch", "on_gpu", "bytes_in", "bytes_out")
    return {name: getattr(figure, name) for name in names}


if __name__ == "__main__":
    main()
