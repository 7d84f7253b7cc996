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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any, Literal

import torch
from torch import Tensor

from rfsq.rfsq_ref.autoencoder import ModelConfig, StepAutoencoder
from rfsq.rfsq_ref.checkpoints import ROBUST_CHECKPOINT, load_checkpoint
from rfsq.rfsq_ref.quantizer import SIGMA_EPSILON
from rfsq.runtime.benchmark.timing import time_calls

EAGER, COMPILED = "torch eager", "torch.compile"
_Coder = Callable[[Tensor], Tensor]
#: One use, finished when it returns.
_Use = Callable[[], object]
_Ways = Iterator[tuple[Literal["host", "device"], _Use]]
#: What one use is, as the other side reads it, and the use itself.
_Figure = tuple[dict[str, Any], _Use]


class PublishedModel(StepAutoencoder):
    """The published operations one by one, as research code spells them: argmin over distances, a loop over layers.

    `rfsq_ref` gives the same tokens in another, faster way, which would flatter the peer.
    """

    grid: Tensor

    def __init__(self, config: ModelConfig, *, is_robust: bool) -> None:
        super().__init__(config.action_dim, config.latent_dim, config.hidden_width)
        self.num_layers, self.is_robust = config.num_layers, is_robust
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


def main() -> None:
    # Whatever libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    request = json.loads(sys.argv[1])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # One core, like our own backend on the CPU.
    torch.set_num_threads(1)
    model, remark = published_model(request)
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else "one core of the CPU, as onnxruntime does"
    unavailable: dict[str, str] = {}
    with torch.no_grad():
        figures = list(peer_figures(model.to(device), request, unavailable))
        offered = {
            "versions": {"torch": torch.__version__},
            "figures": [described for described, _ in figures],
            "unavailable": unavailable,
            "remarks": [remark, f"torch runs on {device_name}; its tokens are int64, twice the bytes of ours"],
        }
        print(json.dumps(offered), file=answers)
        for line in sys.stdin:
            index, calls = map(int, line.split())
            described, use = figures[index]
            try:
                answer: list[float] | str = time_calls(use, calls).tolist()
            except RuntimeError as error:
                answer = f"{described['peer']} failed: {error}"
            print(json.dumps(answer), file=answers)


def published_model(sizes: Mapping[str, Any]) -> tuple[PublishedModel, str]:
    """The model of the bundle's sizes, and whose weights it has."""
    config = ModelConfig(**{field.name: sizes[field.name] for field in fields(ModelConfig)})
    model = PublishedModel(config, is_robust=sizes["mode"] != "none").eval().requires_grad_(False)
    checkpoint = load_checkpoint(ROBUST_CHECKPOINT)
    if checkpoint.config != config:
        return model, "the peers' model has the bundle's sizes and random weights: no embedded checkpoint has its sizes"
    model.load_state_dict(dict(checkpoint.weights))
    return model, "the peers' model is the embedded robust checkpoint, of the bundle's sizes"


def peer_figures(model: PublishedModel, request: Mapping[str, Any], unavailable: dict[str, str]) -> Iterator[_Figure]:
    """Every peer that works here; the others are named in `unavailable`, with the reason."""
    yield from _figures(EAGER, model.encode, model.decode, model, request)
    if not model.grid.is_cuda:
        unavailable[COMPILED] = "torch finds no GPU, and what is compared here is its captured CUDA graph"
        return
    options: dict[str, Any] = {"fullgraph": True, "dynamic": False}
    try:
        from torch._dynamo import config

        # Each prefix and batch is compiled for itself; the default is to give up after 8.
        config.recompile_limit = 64
        encode, decode = torch.compile(model.encode, **options), torch.compile(model.decode, **options)
        yield from list(_figures(COMPILED, encode, decode, model, request))
    except Exception as error:  # Whatever the compiler, its own compilers and CUDA raise
        unavailable[COMPILED] = f"{type(error).__name__}: {str(error).splitlines()[0]}"


def _figures(
    peer: str, encode: _Coder, decode: _Coder, model: PublishedModel, request: Mapping[str, Any]
) -> Iterator[_Figure]:
    device = model.grid.device
    for batch in request["batches"]:
        shape = (batch, request["chunk_length"], request["action_dim"])
        actions = torch.empty(shape).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
        tokens = model.encode(actions.to(device)).cpu()
        for prefix in (None, *reversed(request["prefixes"])):
            function, source = (encode, actions) if prefix is None else (decode, tokens[..., :prefix].contiguous())
            result = tokens if prefix is None else actions
            # Captured by hand: a compiled function that captures itself spends ten times as long on its guards.
            ways = _captured_ways if peer == COMPILED else _ways
            for path, use in ways(function, source, device):
                for _ in range(5):
                    use()
                described = {
                    "peer": peer,
                    "prefix": prefix,
                    "path": path,
                    "batch": batch,
                    "on_gpu": device.type == "cuda",
                    "bytes_in": source.nbytes,
                    "bytes_out": result.nbytes,
                }
                yield described, use


def _ways(function: _Coder, source: Tensor, device: torch.device) -> _Ways:
    if device.type != "cuda":
        yield "host", lambda: function(source)
        return
    on_gpu = source.to(device)

    def on_device() -> None:
        function(on_gpu)
        torch.cuda.synchronize()

    yield "host", lambda: function(source.to(device)).cpu()
    yield "device", on_device


def _captured_ways(function: _Coder, source: Tensor, device: torch.device) -> _Ways:
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


if __name__ == "__main__":
    main()
