"""A record of a finished part is taken as it was written, or refused with a typed error."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfsq.runtime.bundle.manifest import FileEntry
from rfsq.runtime.datasets.errors import OutputError
from rfsq.runtime.datasets.parts import PartRecord

WORK = "0123456789abcdef-0123456789abcdef"
RECORD = PartRecord(2, {"data/x": FileEntry("ab" * 32, 7)}, ("cd" * 32,), ((0, 3, 9, 5), (4, 0, 1, 2)))
CONTENT = json.loads(RECORD.text(WORK))

any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in JSON, by the keys and indices that lead there."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


def changed(path: tuple[Any, ...], new: Any) -> Any:
    content = json.loads(json.dumps(CONTENT))
    if not path:
        return new
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return content


def test_a_record_is_read_back() -> None:
    assert PartRecord.parse(RECORD.text(WORK), WORK) == RECORD


def test_steps_that_were_added_by_hand_are_noticed() -> None:
    text = json.dumps(changed(("runs", 0, 3), RECORD.runs[0][3] + 1)).encode()
    with pytest.raises(OutputError, match="altered after it was written"):
        PartRecord.parse(text, WORK)


def test_a_record_of_another_job_is_refused() -> None:
    with pytest.raises(OutputError, match="altered after it was written"):
        PartRecord.parse(RECORD.text("another"), WORK)


@pytest.mark.slow
@given(st.sampled_from(places(CONTENT)), any_json)
def test_json_of_another_shape_is_refused(path: tuple[Any, ...], new: Any) -> None:
    content = changed(path, new)
    if json.dumps(content) == json.dumps(CONTENT):
        return
    with pytest.raises(OutputError):
        PartRecord.parse(json.dumps(content).encode(), WORK)


@pytest.mark.slow
@given(st.sampled_from([path for path in places(CONTENT) if path and path[0] != "sha256"]), any_json)
def test_of_another_shape_it_is_refused_though_the_hash_was_made_anew(path: tuple[Any, ...], new: Any) -> None:
    """What passes is a record of the right types, which `check` judges."""
    content = changed(path, new)
    text = json.dumps(_hashed_anew(content)).encode()
    try:
        record = PartRecord.parse(text, WORK)
    except OutputError:
        return
    assert record.text(WORK) == text
    assert all(type(number) is int for run in record.runs for number in run)
    assert all(len(bytes.fromhex(digest)) == 32 for digest in record.digests)


def _hashed_anew(content: Any) -> Any:
    import hashlib

    if not isinstance(content, dict):
        return content
    rest = {key: value for key, value in content.items() if key != "sha256"}
    digest = hashlib.sha256(f"{WORK}\n{json.dumps(rest)}".encode()).hexdigest()
    return {**rest, "sha256": digest}


@given(st.binary(max_size=80))
def test_bytes_that_are_no_record_are_refused(text: bytes) -> None:
    with pytest.raises(OutputError):
        PartRecord.parse(text, WORK)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(OutputError):
        PartRecord.parse(b"[" * 100_000, WORK)


@pytest.mark.parametrize(
    ("part", "files", "steps", "digests"),
    [(1, {"data/x"}, 7, 1), (2, {"data/y"}, 7, 1), (2, {"data/x"}, 8, 1), (2, {"data/x"}, 7, 2)],
)
def test_a_record_that_does_not_fit_its_part_is_refused(part: int, files: set[str], steps: int, digests: int) -> None:
    RECORD.check(2, {"data/x"}, 7, 1)
    with pytest.raises(OutputError, match=f"the record of part {part} is about part 2, 1 files, 7 steps and 1 digests"):
        RECORD.check(part, files, steps, digests)
