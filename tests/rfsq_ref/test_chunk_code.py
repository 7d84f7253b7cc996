"""Chunk tokens: every sequence decodes, from any prefix; the escape class bounds the error of every chunk."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from rfsq.rfsq_ref.chunk_bits import MOST_BITS
from rfsq.rfsq_ref.chunk_code import WIDTH, ChunkCode, ChunkConstants, ChunkSizes, bit_counts, ranks
from rfsq.rfsq_ref.chunk_escape import BLOCK_BITS, BLOCK_VALUES, escape_bound, escape_decode, escape_encode
from rfsq.rfsq_ref.errors import SettingsError
from tests.chunk_bundles import random_constants


def random_code(sizes: ChunkSizes, seed: int) -> ChunkCode:
    """Any code of these sizes, in float64."""
    return ChunkCode(sizes, random_constants(sizes, seed)).double()


@st.composite
def any_sizes(draw: st.DrawFn) -> ChunkSizes:
    action_dim, chunk_length = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    num_classes = draw(st.integers(2, 17))
    class_bits = (num_classes - 1).bit_length()
    token_bits = draw(st.integers(max(4, class_bits), 12))
    most = min(20, (action_dim * chunk_length * MOST_BITS + class_bits) // token_bits)
    # The class may take a whole token.
    least = 1 + (class_bits == token_bits)
    assume(most >= least)
    return ChunkSizes(action_dim, chunk_length, num_classes, token_bits, draw(st.integers(least, most)))


@st.composite
def codes(draw: st.DrawFn) -> ChunkCode:
    return random_code(draw(any_sizes()), draw(st.integers(0, 2**32)))


def random_chunks(code: ChunkCode, count: int, seed: int) -> Tensor:
    """In [-1, 1], the ends among them."""
    generator = torch.Generator().manual_seed(seed)
    chunks = torch.rand(count, code.sizes.num_values, generator=generator, dtype=torch.float64) * 2.4 - 1.2
    return chunks.clamp(-1, 1)


def random_tokens(code: ChunkCode, count: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**code.sizes.token_bits, (count, length), generator=generator)


def decoded_by_definition(code: ChunkCode, tokens: list[int]) -> list[float]:
    """One chunk, layer by layer and value by value, from the definition in docs/chunk_tokens.md."""
    sizes = code.sizes
    stream = "".join(f"{token:0{sizes.token_bits}b}" for token in tokens)
    index = int("0" + stream[: sizes.class_bits], 2)
    bits = [int(bit) for bit in stream[sizes.class_bits :]]
    if index >= sizes.escape:
        cells, levels = [0] * sizes.num_values, [1] * sizes.num_values
        blocks = -(-sizes.num_values // BLOCK_VALUES)
        for block in range(min(blocks, len(bits) // BLOCK_BITS)):
            word = min(int("".join(map(str, bits[block * BLOCK_BITS : (block + 1) * BLOCK_BITS])), 2), 242)
            for place in range(BLOCK_VALUES):
                value = block * BLOCK_VALUES + place
                if value < sizes.num_values:
                    cells[value], levels[value] = word // 3 ** (BLOCK_VALUES - 1 - place) % 3, 3
        for place, bit in enumerate(bits[blocks * BLOCK_BITS :][: sizes.num_values * MOST_BITS]):
            value = place % sizes.num_values
            cells[value], levels[value] = 2 * cells[value] + bit, 2 * levels[value]
        return [(2 * cell + 1) / number - 1 for cell, number in zip(cells, levels, strict=True)]
    latents = code.scale.shape[1]
    y, layers = [0.0] * latents, [0] * latents
    for bit, latent in zip(bits, code.order[index].tolist(), strict=False):
        layers[latent] += 1
        y[latent] += (1 if bit else -1) * 2.0 ** -layers[latent]
    chunk = code.mean[index].tolist()
    for latent in range(latents):
        gain = float(code.gain[index, latent, layers[latent]])
        z = WIDTH * gain * float(code.scale[index, latent]) * math.atanh(y[latent])
        chunk = [value + z * float(part) for value, part in zip(chunk, code.basis[index, :, latent], strict=True)]
    return [min(max(value, -1.0), 1.0) for value in chunk]


@given(codes(), st.integers(0, 2**32))
def test_every_sequence_of_every_length_decodes_as_the_definition_says(code: ChunkCode, seed: int) -> None:
    for length in {1, (code.sizes.num_tokens + 1) // 2, code.sizes.num_tokens}:
        tokens = random_tokens(code, 3, length, seed)
        decoded = code.decode(tokens)
        expected = torch.tensor([decoded_by_definition(code, row) for row in tokens.tolist()], dtype=torch.float64)
        torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-12)
        assert decoded.abs().max() <= 1


@given(codes(), st.integers(0, 2**32))
def test_no_value_errs_by_more_than_the_bound(code: ChunkCode, seed: int) -> None:
    chunks = random_chunks(code, 4, seed)
    tokens = code.encode(chunks)
    assert tokens.shape == (4, code.sizes.num_tokens)
    assert tokens.min() >= 0
    assert tokens.max() < 2**code.sizes.token_bits
    for budget in code.budgets:
        error = (code.decode(tokens[:, :budget]) - chunks).abs().max()
        assert error <= code.bound(budget) + 1e-12


@given(codes(), st.integers(0, 2**32))
def test_the_class_is_the_cheapest_of_those_that_keep_the_bound(code: ChunkCode, seed: int) -> None:
    """By decoding every trial, where no latent is cut off."""
    chunks = random_chunks(code, 3, seed) * 0.3
    bits = [budget * code.sizes.token_bits - code.sizes.class_bits for budget in code.budgets]
    expected = []
    for chunk in chunks:
        found = [(math.inf, code.sizes.escape)]
        for index in range(code.sizes.escape):
            cost, keeps = 0.0, True
            for weight, count in zip(code.weights.tolist(), bits, strict=True):
                tokens = code.encode_in(chunk[None], torch.tensor([index]))
                part = code.bits(tokens)[:, code.sizes.class_bits :][:, :count]
                classes = torch.tensor([index])
                whole = code.chunks(code.latents(*code.companded(part, classes), classes), classes)
                cost += weight * float((whole - chunk).square().sum())
                keeps &= bool(((whole.clamp(-1, 1) - chunk).abs() <= escape_bound(count, code.sizes.num_values)).all())
            found.append((cost if keeps else math.inf, index))
        best = min(found)
        expected.append(best[1] if best[0] < math.inf else code.sizes.escape)
    assert code.classes(code.bits(code.encode(chunks))).tolist() == expected


@given(codes(), st.integers(0, 2**32))
def test_what_a_class_decodes_it_encodes_as_it_was(code: ChunkCode, seed: int) -> None:
    """Where nothing is clipped; so a chunk that goes back and forth stays what it is."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, code.sizes.escape, (4,), generator=generator)
    bits = torch.randint(0, 2, (4, code.sizes.code_bits), generator=generator)
    chunks = code.chunks(code.latents(*code.companded(bits, classes), classes), classes)
    found = code.bits(code.encode_in(chunks, classes))
    assert (code.classes(found) == classes).all()
    # Above 10 bits a cell is as narrow as what float32 constants leave of an orthonormal basis.
    coarse = code.rank[classes] < 10
    assert (found[:, code.sizes.class_bits :] == bits)[coarse].all()


@given(codes(), st.integers(0, 2**32))
def test_float32_decodes_alike(code: ChunkCode, seed: int) -> None:
    tokens = random_tokens(code, 4, code.sizes.num_tokens, seed)
    expected = code.decode(tokens)
    torch.testing.assert_close(code.float().decode(tokens).double(), expected, rtol=0, atol=2e-4)


@given(st.integers(1, 40), st.integers(0, 600), st.integers(0, 2**32))
def test_escape_halves_its_cells_value_by_value(num_values: int, num_bits: int, seed: int) -> None:
    chunks = torch.rand(3, num_values, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    code = escape_encode(chunks, 600)
    decoded = escape_decode(code[:, :num_bits], num_values)
    assert (decoded - chunks).abs().max() <= escape_bound(num_bits, num_values) + 1e-12
    assert escape_bound(num_bits + 1, num_values) <= escape_bound(num_bits, num_values)
    again = escape_encode(decoded, 600)[:, :num_bits]
    torch.testing.assert_close(escape_decode(again, num_values), decoded, rtol=0, atol=1e-12)


def test_the_bounds_of_the_default_sizes() -> None:
    sizes = ChunkSizes(7, 8)
    bounds = [escape_bound(10 * tokens - sizes.class_bits, sizes.num_values) for tokens in (16, 30, 36, 45)]
    assert bounds == [1 / 6, 1 / 24, 1 / 48, 1 / 192]


def test_chunks_far_outside_are_coded_at_the_ends() -> None:
    code = random_code(ChunkSizes(2, 3, num_tokens=10), seed=0)
    chunks = torch.tensor([[-1e30, 1e30, 5.0, -5.0, 1.0, -1.0]], dtype=torch.float64)
    assert (code.decode(code.encode(chunks)) - chunks.clamp(-1, 1)).abs().max() <= code.bound(10) + 1e-12


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_classes": 1}, "num_classes is 1; expected an integer from 2 to 256"),
        ({"num_tokens": True}, "num_tokens is True"),
        ({"num_classes": 64, "token_bits": 5}, "64 classes take 6 bits, and a token has 5"),
        ({"num_classes": 64, "token_bits": 6, "num_tokens": 1}, "the one token of a chunk is all taken by its class"),
        ({"action_dim": 1, "chunk_length": 1}, "45 tokens are more than a chunk of 1 values can use"),
    ],
)
def test_sizes_that_no_code_has_are_refused(changes: dict[str, int], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        ChunkSizes(**{"action_dim": 7, "chunk_length": 8, **changes})


@pytest.mark.parametrize("name", ["mean", "basis", "scale", "gain", "order", "budgets", "weights"])
def test_constants_of_no_code_are_refused(name: str) -> None:
    sizes = ChunkSizes(2, 3, num_tokens=10)
    code = random_code(sizes, seed=0).float()
    constants = ChunkConstants(
        **{field: getattr(code, field) for field in ("mean", "basis", "scale", "gain", "order", "budgets", "weights")}
    )
    ChunkCode(sizes, constants)
    good = getattr(constants, name)
    for bad in [(0,), (2, 1), (11,)] if name == "budgets" else [good[:-1], -torch.inf * good]:
        with pytest.raises(SettingsError):
            ChunkCode(sizes, replace(constants, **{name: bad}))


@given(st.lists(st.lists(st.integers(0, 5), min_size=9, max_size=9), min_size=1, max_size=4))
def test_bits_are_counted_latent_by_latent(rows: list[list[int]]) -> None:
    order = torch.tensor(rows)
    assert ranks(order).tolist() == [[row[:place].count(row[place]) for place in range(9)] for row in rows]
    assert bit_counts(order, 6).tolist() == [[row.count(latent) for latent in range(6)] for row in rows]
