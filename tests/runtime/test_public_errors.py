"""Whatever a caller passes by mistake, every public method says so with the error that it promises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rfsq.runtime import ActionTokenizer
from rfsq.runtime.bundle.errors import IdTypeError, InvalidInputError, VocabularyError
from rfsq.runtime.policy.vocabulary import TokenVocabulary
from tests.bundles import Recipe, random_actions


class Unhelpful:
    """Fails wherever it is asked for something."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __len__(self) -> int:
        raise RuntimeError


class WithoutDevice:
    def __dlpack_device__(self) -> tuple[int, int]:
        raise RuntimeError("no such device")


class WithOddDevice:
    def __dlpack_device__(self) -> str:
        return "a GPU"


#: Nothing of this is an array, a number, a name, a path or a mapping.
JUNK: Mapping[str, object] = {
    "None": None,
    "a fraction": 1.5,
    "a list": ["c"],
    "a set": {1},
    "bytes": b"c",
    "a class": np.ndarray,
    "an object": object(),
    "one that fails": Unhelpful(),
    "one whose device fails": WithoutDevice(),
    "one whose device is odd": WithOddDevice(),
    "an array of objects": np.array([None, "x"], object),
    "an array of no numbers": np.array(["x"]),
    "a number of no array": np.float32(0.5),
}


@pytest.fixture
def actions() -> np.ndarray:
    return random_actions(Recipe(), 2)


Call = Callable[[ActionTokenizer, Any, np.ndarray], object]
CALLS: Mapping[str, Call] = {
    "encode": lambda tokenizer, junk, _: tokenizer.encode(junk),
    "encode_into": lambda tokenizer, junk, _: tokenizer.encode_into(junk, np.empty((2, 2, 4, 3), np.int32)),
    "encode_into, out": lambda tokenizer, junk, actions: tokenizer.encode_into(actions, junk),
    "encode_with_stats": lambda tokenizer, junk, _: tokenizer.encode_with_stats(junk),
    "bind_encode": lambda tokenizer, junk, _: tokenizer.bind_encode(junk, junk),
    "decode": lambda tokenizer, junk, _: tokenizer.decode(junk),
    "decode_into": lambda tokenizer, junk, actions: tokenizer.decode_into(junk, actions),
    "decode_into, out": lambda tokenizer, junk, actions: tokenizer.decode_into(tokenizer.encode(actions), junk),
    "bind_decode": lambda tokenizer, junk, _: tokenizer.bind_decode(junk, junk),
    "warmup": lambda tokenizer, junk, _: tokenizer.warmup(junk),
    "load, path": lambda _tokenizer, junk, _: ActionTokenizer.load(junk),
    "load, backend": lambda tokenizer, junk, _: ActionTokenizer.load(folder_of(tokenizer), backend=junk),
}
#: Of arguments that may be left out, as None.
OPTIONAL: Mapping[str, Call] = {
    "encode_into, stats": lambda tokenizer, junk, actions: tokenizer.encode_into(
        actions, np.empty((2, 2, 4, 3), np.int32), junk
    ),
    "decode, stats": lambda tokenizer, junk, actions: tokenizer.decode(tokenizer.encode(actions), junk),
    "decode_into, stats": lambda tokenizer, junk, actions: tokenizer.decode_into(
        tokenizer.encode(actions), actions, junk
    ),
    "load, fingerprint": lambda tokenizer, junk, _: ActionTokenizer.load(folder_of(tokenizer), expect_fingerprint=junk),
}


def folder_of(tokenizer: ActionTokenizer) -> Path:
    assert tokenizer.folder is not None
    return tokenizer.folder


def test_every_public_method_that_takes_something_is_tried() -> None:
    methods = {name for name, part in vars(ActionTokenizer).items() if callable(part) and not name.startswith("_")}
    assert methods - {"close"} <= {name.partition(",")[0] for name in CALLS}


@pytest.mark.parametrize(
    ("call", "junk"),
    [(call, junk) for call in (*CALLS, *OPTIONAL) for junk in JUNK if call in CALLS or JUNK[junk] is not None],
)
def test_what_is_none_of_what_a_tokenizer_takes_is_invalid_input(
    call: str, junk: str, tokenizer: ActionTokenizer, actions: np.ndarray
) -> None:
    with pytest.raises(InvalidInputError):
        ({**CALLS, **OPTIONAL})[call](tokenizer, JUNK[junk], actions)


@pytest.mark.parametrize("junk", JUNK)
def test_a_tokenizer_of_stats_refuses_the_same(junk: str, dynamic_tokenizer: ActionTokenizer) -> None:
    actions = random_actions(Recipe(), 2)
    tokens, stats = dynamic_tokenizer.encode_with_stats(actions)
    calls: list[Callable[[Any], object]] = [
        dynamic_tokenizer.encode_with_stats,
        lambda value: dynamic_tokenizer.decode(tokens, value),
        lambda value: dynamic_tokenizer.decode(value, stats),
    ]
    for call in calls:
        with pytest.raises(InvalidInputError):
            call(JUNK[junk])


@pytest.mark.parametrize("batch", [0, -1, True, 2**31, 10**30, 2**31 - 1])
def test_no_warmup_of_what_is_no_number_of_chunks_or_of_too_many(
    batch: int, tokenizer: ActionTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object) -> None:
        raise MemoryError("Unable to allocate")

    monkeypatch.setattr(np, "zeros", refuse)
    with pytest.raises(InvalidInputError, match=r"batch is .*(expected an int from 1 to 2147483647|memory holds here)"):
        tokenizer.warmup(batch)


def test_numpys_whole_numbers_warm_up_as_well(tokenizer: ActionTokenizer) -> None:
    tokenizer.warmup(np.int64(2))  # type: ignore[arg-type]


# --- vocabularies -----------------------------------------------------------------------------------------------------

VOCABULARY = TokenVocabulary(3, 5, 4, 2)


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("name", list(VOCABULARY.__dataclass_fields__))
def test_a_vocabulary_of_what_is_no_setting_is_refused(name: str, junk: str) -> None:
    with pytest.raises(VocabularyError, match=name.partition("_id")[0]):
        replace(VOCABULARY, **{name: JUNK[junk]})


@pytest.mark.parametrize(
    "changes",
    [
        {"num_levels": 2**31 + 1},
        {"num_levels": 2**33},
        {"num_layers": 10**9},
        {"latent_dim": 2**24},
        {"chunk_length": 10**30},
        {"special_ids": (1, 2)},
        {"special_ids": None},
        {"special_ids": (("eos",),)},
        {"special_ids": (([], 100),)},
        {"fingerprint": 7},
    ],
    ids=str,
)
def test_settings_that_no_tokenizer_has_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(VocabularyError):
        replace(VOCABULARY, **changes)


def test_the_most_levels_are_told_apart() -> None:
    widest = TokenVocabulary(1, 2**31, 1, 1)
    tokens = np.array([[[[2**31 - 1]]]], np.int32)
    assert np.array_equal(widest.to_tokens(widest.to_ids(tokens)), tokens)


@pytest.mark.parametrize("junk", JUNK)
def test_what_is_no_position_no_tokens_and_no_ids_is_refused(junk: str) -> None:
    value: Any = JUNK[junk]
    with pytest.raises(InvalidInputError, match="position is"):
        VOCABULARY.ids_at(value)
    with pytest.raises(InvalidInputError, match="tokens"):
        VOCABULARY.to_ids(value)
    with pytest.raises(IdTypeError, match="ids"):
        VOCABULARY.to_tokens(value)
    with pytest.raises(InvalidInputError, match="tokenizer is a"):
        TokenVocabulary.from_tokenizer(value)
    if value is not None:
        with pytest.raises(InvalidInputError, match="partial is"):
            VOCABULARY.to_tokens(np.zeros((1, 24), np.int64), partial=value)


def test_truth_is_no_position_and_a_whole_number_of_numpy_is_one() -> None:
    with pytest.raises(InvalidInputError, match="position is True"):
        VOCABULARY.ids_at(True)
    assert VOCABULARY.ids_at(np.int64(1)) == VOCABULARY.ids_at(1)  # type: ignore[arg-type]


def test_special_ids_of_a_tokenizer_are_a_dict(tokenizer: ActionTokenizer) -> None:
    with pytest.raises(VocabularyError, match="expected a dict"):
        TokenVocabulary.from_tokenizer(tokenizer, special_ids=[("eos", 1)])  # type: ignore[arg-type]
