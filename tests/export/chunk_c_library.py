"""The generated C of chunk tokens: written into a folder, compiled, called from numpy, and held to the reference.

What is judged is the class by its cost, and every latent by the cell that its bits name.
"""

import ctypes
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rfsq.export.c_builder import HEADER_NAME, SOURCE_NAME
from rfsq.export.chunk_c_source import c_chunk_tokenizer
from rfsq.export.chunk_plan import plan_chunk_code
from rfsq.rfsq_ref.chunk_code import WIDTH, ChunkCode, ChunkSizes
from rfsq.rfsq_ref.chunk_escape import escape_bound, escape_encode
from rfsq.rfsq_ref.chunk_model import ChunkTokenizer
from rfsq.rfsq_ref.normaliser import Normaliser
from rfsq.rfsq_ref.settings import NormaliserKind
from rfsq.runtime.bundle.comparison import action_errors
from tests.export.c_library import OK, UNTOUCHED, Array, run
from tests.export.test_c_source import QUICK
from tests.rfsq_ref.test_chunk_code import random_constants

FINGERPRINT = "f" * 64
#: In normalised units.
DECODE_ERROR = 1e-6


def write_code(folder: Path, tokenizer: ChunkTokenizer, alter: Callable[[str], str] = str) -> Path:
    """Header and source in `folder`, which is also returned. alter: what becomes of the source."""
    folder.mkdir(parents=True, exist_ok=True)
    generated = c_chunk_tokenizer(plan_chunk_code(tokenizer), FINGERPRINT)
    (folder / HEADER_NAME).write_text(generated.header, encoding="utf-8")
    (folder / SOURCE_NAME).write_text(alter(generated.source), encoding="utf-8")
    return folder


class Library:
    """Functions return their status, and what they wrote over `UNTOUCHED`. tokenizer: in float64."""

    def __init__(
        self,
        folder: Path,
        tokenizer: ChunkTokenizer,
        flags: Sequence[str] = QUICK,
        compiler: str = "gcc",
        alter: Callable[[str], str] = str,
    ) -> None:
        write_code(folder, tokenizer, alter)
        run([compiler, *flags, "-fPIC", "-shared", SOURCE_NAME, "-o", "library.so"], folder)
        self.tokenizer, self.sizes = tokenizer, tokenizer.sizes
        self._library = ctypes.CDLL(str(folder / "library.so"))

    def encode(self, actions: Array) -> tuple[int, Array]:
        """actions float32 [B, T, A]."""
        tokens = np.full((len(actions), self.sizes.num_tokens), UNTOUCHED, np.int32)
        return self._library.rfsq_encode(_at(actions), ctypes.c_size_t(len(actions)), _at(tokens)), tokens

    def decode(self, tokens: Array) -> tuple[int, Array]:
        """tokens int32 [B, l]."""
        actions = np.full((len(tokens), self.sizes.chunk_length, self.sizes.action_dim), UNTOUCHED, np.float32)
        counts = map(ctypes.c_size_t, (tokens.shape[1], len(tokens)))
        return self._library.rfsq_decode(_at(tokens), *counts, _at(actions)), actions

    def believe(
        self,
        given: tuple[Array, ...],
        *,
        is_logits: bool,
        keeps_mode: bool = False,
        sharpness: Array | None = None,
        wants_all: bool = True,
    ) -> tuple[int, Array, Array, Array, Array]:
        """given: words float32 [B, l, V] alone, or classes [B, C] and bits [B, n]; actions, deviations,
        mode_probability and mode; without wants_all the first alone."""
        batch = len(given[0])
        actions = np.full((batch, self.sizes.chunk_length, self.sizes.action_dim), UNTOUCHED, np.float32)
        deviations, mode_probability = actions.copy(), np.full(batch, UNTOUCHED, np.float32)
        mode, length = np.full(batch, UNTOUCHED, np.int32), given[-1].shape[1]
        own = np.ones(1 + length, np.float32) if sharpness is None else sharpness
        function = self._library.rfsq_decode_beliefs if len(given) == 1 else self._library.rfsq_decode_bit_beliefs
        terms = (ctypes.c_size_t(length), _at(own), int(is_logits), int(keeps_mode), ctypes.c_size_t(batch))
        others = map(_at, (deviations, mode_probability, mode)) if wants_all else (None, None, None)
        return function(*map(_at, given), *terms, _at(actions), *others), actions, deviations, mode_probability, mode


def _at(array: Array) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def random_tokenizer(sizes: ChunkSizes, seed: int) -> ChunkTokenizer:
    """Any tokenizer of these sizes, in float64; every second one with a normaliser."""
    generator = np.random.default_rng(seed)
    offset, scale = generator.uniform((-1, 0.1), (1, 3), (sizes.action_dim, 2)).astype(np.float32).T.tolist()
    normaliser = Normaliser(NormaliserKind.QUANTILE, tuple(offset), tuple(scale)) if seed % 2 else None
    return ChunkTokenizer(sizes, random_constants(sizes, seed), normaliser).double()


def random_actions(tokenizer: ChunkTokenizer, count: int, spread: float, seed: int) -> Array:
    """What decodes from any tokens, moved by so much: some is near a class, some beyond [-1, 1]."""
    tokens = torch.from_numpy(random_tokens(tokenizer.sizes, count, tokenizer.sizes.num_tokens, seed))
    noise = np.random.default_rng(seed).normal(size=(count, tokenizer.sizes.num_values)) * spread
    chunks = tokenizer.code.decode(tokens).numpy() + noise
    shape = (count, tokenizer.sizes.chunk_length, tokenizer.sizes.action_dim)
    actions: Array = chunks.reshape(shape) * tokenizer.units.numpy() + tokenizer.offset.numpy()
    return actions.astype(np.float32)


def random_tokens(sizes: ChunkSizes, count: int, length: int, seed: int) -> Array:
    """Of every class; a fourth of them of escape, or of the numbers behind it."""
    tokens = np.random.default_rng(seed).integers(2**sizes.token_bits, size=(count, length), dtype=np.int32)
    room = sizes.token_bits - sizes.class_bits
    tokens[::4, 0] = np.maximum(tokens[::4, 0] >> room, sizes.escape) << room | tokens[::4, 0] & ((1 << room) - 1)
    return tokens


# --- what is right ----------------------------------------------------------------------------------------------------


def check_encoder(library: Library, actions: Array) -> Array:
    """Which of the chunks are coded by escape: bool [B]."""
    status, found = library.encode(actions)
    assert status == OK
    return check_tokens(library.tokenizer, actions, found)


def check_tokens(tokenizer: ChunkTokenizer, actions: Array, found: Array) -> Array:
    """The same of the tokens that an encoder has given."""
    code = tokenizer.code
    assert found.min() >= 0
    assert found.max() < 2**code.sizes.token_bits
    chunks = tokenizer.normalised(torch.from_numpy(actions).double()).clamp(-1, 1)
    bits = code.bits(torch.from_numpy(found))
    classes, chosen = code.classes(bits), code.choose(chunks)
    for row in torch.nonzero(classes != chosen).flatten().tolist():
        check_near_tie(code, chunks[row], int(classes[row]))
    escaped = classes == code.sizes.escape
    own, rest = classes[~escaped], chunks[~escaped]
    latents = torch.einsum("bn,bnm->bm", rest - code.mean[own], code.basis[own])
    y, counts = code.companded(bits[~escaped][:, code.sizes.class_bits :], own)
    # Float32 moves a latent by some 1e-7 of the values that it sums, and tanh by as much.
    rounding = 1e-6 / (WIDTH * code.scale[own]) + 1e-6
    assert ((y - code.compand(latents, own)).abs() <= torch.exp2(-counts.double()) + rounding).all()
    # The normalised action itself is a float32.
    plan = plan_chunk_code(tokenizer)
    exact = ((actions - plan.offset) * plan.inverse_units).clip(-1, 1).reshape(len(actions), -1)[escaped.numpy()]
    torch.testing.assert_close(
        bits[escaped][:, code.sizes.class_bits :], escape_encode(torch.from_numpy(exact), code.sizes.code_bits)
    )
    return escaped.numpy()


def check_near_tie(code: ChunkCode, chunk: Tensor, found: int) -> None:
    """By less than float32 rounds, the class found keeps the bound, and no other that keeps it is cheaper."""
    costs, over = code.costs(chunk[None])[0].tolist(), []
    for index in range(code.sizes.escape):
        own = torch.tensor([index])
        latents = (chunk - code.mean[index]) @ code.basis[index]
        bits = code.code_in(latents[None], own)
        errors = [(code.decode_in(bits[:, :count], own) - chunk).abs().max() for count in code.budget_bits]
        bounds = [escape_bound(count, code.sizes.num_values) for count in code.budget_bits]
        over.append(max(float(error) - bound for error, bound in zip(errors, bounds, strict=True)))
    assert found == code.sizes.escape or over[found] < 1e-6
    limit = math.inf if found == code.sizes.escape else costs[found]
    assert not any(cost * (1 + 1e-5) < limit and most < -1e-6 for cost, most in zip(costs, over, strict=True))


def check_decoder(library: Library, tokens: Array) -> None:
    status, found = library.decode(tokens)
    assert status == OK
    check_actions(library.tokenizer, tokens, found)


def check_actions(tokenizer: ChunkTokenizer, tokens: Array, found: Array) -> None:
    expected = tokenizer.decode(torch.from_numpy(tokens)).numpy()
    worst = action_errors(expected, found, tokenizer.units.numpy())
    assert worst.value <= DECODE_ERROR, worst
