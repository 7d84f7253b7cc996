"""Ids of chunk tokens: one range for every position, any beginning of a chunk, and nothing repaired."""

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfsq.runtime import ActionTokenizer, ChunkVocabulary, InvalidInputError, TokenVocabulary
from rfsq.runtime.bundle.errors import (
    ForeignIdError,
    MalformedIdsError,
    SequenceTooLongError,
    SequenceTooShortError,
    SpecialIdError,
    VocabularyError,
)
from tests.chunk_bundles import SMALL as SIZES
from tests.chunk_bundles import ChunkRecipe, write_chunk_bundle
from tests.once import once

#: 100 ... 115 at each of 4 positions.
SMALL = ChunkVocabulary(4, 16, offset=100, special_ids=(("bos", 1), ("eos", 2), ("pad", 200)))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ActionTokenizer:
    path = once(tmp_path_factory, "chunk bundle", lambda path: write_chunk_bundle(path, ChunkRecipe()))
    return ActionTokenizer.load(path)


@given(
    st.lists(st.lists(st.integers(0, 15), min_size=4, max_size=4), max_size=5),
    st.sampled_from([np.int32, np.int64, np.uint16]),
)
def test_every_token_comes_back(rows: list[list[int]], dtype: type) -> None:
    tokens = np.array(rows, dtype).reshape(-1, 4)
    ids = SMALL.to_ids(tokens)
    assert (ids.dtype, ids.shape) == (np.int64, tokens.shape)
    np.testing.assert_array_equal(ids, tokens.astype(int) + 100)
    back = SMALL.to_tokens(ids)
    assert (back.dtype, back.flags.c_contiguous) == (np.int32, True)
    np.testing.assert_array_equal(back, tokens)


def test_every_id_may_stand_at_every_position() -> None:
    assert (SMALL.ids, SMALL.sequence_length, SMALL.size) == (range(100, 116), 4, 201)
    assert [SMALL.ids_at(position) for position in range(4)] == [range(100, 116)] * 4
    for position in (-1, 4):
        with pytest.raises(InvalidInputError, match=r"expected 0 \.\.\. 3"):
            SMALL.ids_at(position)


@pytest.mark.parametrize("length", [1, 3, 4])
def test_a_beginning_decodes(length: int) -> None:
    ids = np.array([[100, 107, 115, 101], [103, 100, 100, 2]])
    ids[:, length:] = 2
    found = SMALL.to_tokens(ids[:1], partial="prefix")
    assert (found.tokens.tolist(), found.whole.tolist(), found.used) == ([[0, 7, 15, 1][:length]], [length], length)
    both = SMALL.to_tokens(ids, partial="prefix")
    assert both.used == min(length, 3)
    assert both.whole.tolist() == [length, min(length, 3)]


@pytest.mark.parametrize(
    ("ids", "kind", "message"),
    [
        ([100, 101, 102], SequenceTooShortError, "sequence 0 has 3 ids; expected L = 4; to take what is whole"),
        ([100, 101, 102, 103, 104], SequenceTooLongError, "one too many; expected nothing behind the 4 ids"),
        (
            [100, 99, 102, 103],
            ForeignIdError,
            "ids[0, 1] is 99, no id of this vocabulary; expected 100 ... 115, a token",
        ),
        ([100, 101, 116, 103], ForeignIdError, "ids[0, 2] is 116"),
        ([100, 101, 102, 2], SpecialIdError, "ids[0, 3] is 2, the special id 'eos'"),
    ],
)
def test_malformed_ids_are_refused_at_their_place(ids: list[int], kind: type[MalformedIdsError], message: str) -> None:
    with pytest.raises(kind) as caught:
        SMALL.to_tokens(np.array([ids]))
    assert type(caught.value) is kind
    assert message in str(caught.value)


def test_a_sequence_without_a_token_is_too_short() -> None:
    ids = np.array([[100, 101, 2, 200], [2, 200, 200, 200]])
    with pytest.raises(SequenceTooShortError, match="expected at least 1, one whole token: leave out") as caught:
        SMALL.to_tokens(ids, partial="prefix")
    assert caught.value.row == 1
    whole = SMALL.count_whole(ids)
    assert whole.tolist() == [2, 0]
    assert SMALL.to_tokens(ids[whole > 0], partial="prefix").tokens.tolist() == [[0, 1]]


def test_sequences_of_each_length_are_counted_and_decode_together() -> None:
    ids = np.array([[100, 101, 2, 200], [107, 2, 2, 2], [115, 114, 113, 112], [100, 115, 200, 200]])
    whole = SMALL.count_whole(ids)
    assert (whole.dtype, whole.tolist()) == (np.int64, [2, 1, 4, 2])
    found = {n: SMALL.to_tokens(ids[whole == n], partial="prefix").tokens.tolist() for n in set(whole.tolist())}
    assert found == {2: [[0, 1], [0, 15]], 1: [[7]], 4: [[15, 14, 13, 12]]}
    assert SMALL.count_whole(np.empty((0, 4), np.int64)).tolist() == []
    assert SMALL.count_whole(np.empty((2, 0), np.int64)).tolist() == [0, 0]
    assert SMALL.count_whole(ids[:, :1]).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("ids", "kind", "message"),
    [
        (
            [100, 2, 103, 200],
            SpecialIdError,
            "ids[0, 1] is 2, the special id 'eos', and other ids than special ones follow; expected only special ids "
            "behind it, bos, eos, pad: cut off what follows the end, or name the padding in special_ids",
        ),
        ([100, 2, 0, 0], SpecialIdError, "name the padding in special_ids"),
        ([100, 99, 2, 200], ForeignIdError, "ids[0, 1] is 99, no id of this vocabulary"),
        ([100, 101, 102, 103, 104], SequenceTooLongError, "one too many"),
    ],
)
def test_behind_the_end_stand_special_ids_alone(ids: list[int], kind: type[MalformedIdsError], message: str) -> None:
    for call in (lambda ids: SMALL.to_tokens(ids, partial="prefix"), SMALL.count_whole):
        with pytest.raises(kind) as caught:
            call(np.array([ids]))
        assert type(caught.value) is kind
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_tokens": 0}, "num_tokens is 0; expected an int of at least 1"),
        ({"vocabulary": 1}, "vocabulary is 1; expected an int of at least 2"),
        ({"vocabulary": 2**31 + 1}, r"expected at most 2\^31"),
        ({"special_ids": (("eos", 107),)}, r"'eos' is 107, which is the token 7: tokens have 100 \.\.\. 115"),
        ({"offset": 2**63}, "beyond int64"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(VocabularyError, match=message):
        dataclasses.replace(SMALL, **changed)


def test_tokens_of_another_shape_or_value_are_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"\[B, L\] = \[B, 4\]: for the first l tokens"):
        SMALL.to_ids(np.zeros((1, 3), np.int32))
    with pytest.raises(InvalidInputError, match="tokens have type uint8; expected int32, int64 or uint16"):
        # Words of a larger vocabulary would have wrapped.
        SMALL.to_ids(np.zeros((1, 4), np.uint8))
    with pytest.raises(InvalidInputError, match=r"tokens\[0, 2\] is 16; expected 0 \.\.\. 15"):
        SMALL.to_ids(np.array([[0, 0, 16, 0]], np.int32))


def test_it_is_made_for_its_tokenizer(tokenizer: ActionTokenizer) -> None:
    found = TokenVocabulary.for_tokenizer(tokenizer, offset=32000, special_ids={"eos": 2})
    assert found == ChunkVocabulary(SIZES.num_tokens, 256, 32000, (("eos", 2),), tokenizer.fingerprint)
    tokens = tokenizer.encode(np.zeros((2, SIZES.chunk_length, SIZES.action_dim), np.float32))
    part = found.to_tokens(found.to_ids(tokens)[:, :5], partial="prefix")
    np.testing.assert_array_equal(tokenizer.decode(part.tokens), tokenizer.decode(tokens[:, :5]))
    with pytest.raises(InvalidInputError, match=r"for_tokenizer gives the one that fits"):
        TokenVocabulary.from_tokenizer(tokenizer)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"num_tokens": SIZES.num_tokens + 1}, f"num_tokens is .*has {SIZES.num_tokens}; expected .* or fewer"),
        ({"vocabulary": 512}, "vocabulary is 512, and the tokenizer .* has 256; expected 256:"),
        ({"vocabulary": 128}, "vocabulary is 128, and the tokenizer"),
    ],
)
def test_no_other_vocabulary_bears_the_tokenizers_fingerprint(
    changed: dict[str, int], expected: str, tokenizer: ActionTokenizer
) -> None:
    whole = ChunkVocabulary.from_tokenizer(tokenizer)
    fewer = dataclasses.replace(whole, num_tokens=3)
    assert (fewer.num_tokens, fewer.fingerprint) == (3, tokenizer.fingerprint)
    for vocabulary in (whole, fewer, ChunkVocabulary(**json.loads(json.dumps(dataclasses.asdict(fewer))))):
        with pytest.raises(VocabularyError, match=expected):
            dataclasses.replace(vocabulary, **changed)


def test_integers_of_numpy_are_integers() -> None:
    given = ChunkVocabulary(np.int32(4), np.uint16(16), np.int64(100), (("eos", np.int64(2)),))
    assert given == ChunkVocabulary(4, 16, 100, (("eos", 2),))
    assert json.loads(json.dumps(dataclasses.asdict(given)))["offset"] == 100
    for wrong in (True, 1.0, np.float32(1), np.bool_(1), "1"):
        with pytest.raises(VocabularyError, match="offset is"):
            dataclasses.replace(given, offset=wrong)


def test_per_step_tokens_have_the_other_vocabulary(bundle: Path) -> None:
    with ActionTokenizer.load(bundle) as tokenizer:
        assert TokenVocabulary.for_tokenizer(tokenizer, offset=5) == TokenVocabulary.from_tokenizer(tokenizer, offset=5)
        with pytest.raises(InvalidInputError, match=r"for_tokenizer gives the one that fits"):
            ChunkVocabulary.from_tokenizer(tokenizer)


def test_it_goes_through_json_and_pickle() -> None:
    assert pickle.loads(pickle.dumps(SMALL)) == SMALL  # noqa: S301  # made here
    assert ChunkVocabulary(**json.loads(json.dumps(dataclasses.asdict(SMALL)))) == SMALL
