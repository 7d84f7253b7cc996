"""Golden vectors are written the same way every time, read strictly, and replayed without mercy."""

import io
import re
import struct
import zipfile
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rfsq.export.plan import DeployMode
from rfsq.runtime.backends.contract import Backend
from rfsq.runtime.backends.registry import create_backend
from rfsq.runtime.backends.replay import replay
from rfsq.runtime.bundle.errors import BundleError, InferenceError
from rfsq.runtime.bundle.folder import open_bundle
from rfsq.runtime.bundle.gates import GATES, Check, highest_bounds
from rfsq.runtime.bundle.golden import Golden, read_golden, write_golden
from rfsq.runtime.bundle.manifest import GOLDEN_NAME
from rfsq.runtime.bundle.models import ModelEntry
from tests.bundles import Recipe


@pytest.fixture(scope="module", params=list(DeployMode))
def case(request: pytest.FixtureRequest, bundle_of: Callable[[Recipe], Path]) -> tuple[Golden, ModelEntry, Backend]:
    bundle = open_bundle(bundle_of(Recipe(mode=request.param)))
    model = bundle.manifest.model
    return read_golden(bundle.content(GOLDEN_NAME), model), model, create_backend("onnxruntime", bundle)


@pytest.fixture
def golden(bundle: Path) -> Golden:
    opened = open_bundle(bundle)
    return read_golden(opened.content(GOLDEN_NAME), opened.manifest.model)


@pytest.fixture
def model(bundle: Path) -> ModelEntry:
    return open_bundle(bundle).manifest.model


def assert_equal(first: Golden, second: Golden) -> None:
    for name in ("actions", "tokens", "margins", "bounds", "stats", "near_tie_cap", "flip_tolerance"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert first.decoded.keys() == second.decoded.keys()
    for prefix in first.decoded:
        np.testing.assert_array_equal(first.decoded[prefix], second.decoded[prefix])


def members(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archive_of(files: dict[str, bytes], deflated: Collection[str] = ()) -> bytes:
    output = io.BytesIO()
    with zipfile.ZipFile(output, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if name in deflated else zipfile.ZIP_STORED)
    return output.getvalue()


def with_chunks(golden: Golden, count: int) -> Golden:
    """So many chunks: the first, or the same ones again and again."""

    def resized(array: Any) -> Any:
        return np.resize(array, (count, *array.shape[1:]))

    arrays = ("actions", "tokens", "margins", "bounds")
    return replace(
        golden,
        **{name: resized(getattr(golden, name)) for name in arrays},
        stats=None if golden.stats is None else resized(golden.stats),
        decoded={prefix: resized(actions) for prefix, actions in golden.decoded.items()},
    )


def npy(array: Any, **options: Any) -> bytes:
    output = io.BytesIO()
    np.lib.format.write_array(output, np.asarray(array), **options)
    return output.getvalue()


class Wrapper:
    """A backend that answers as another does, but for what a test changes."""

    name, description, device, checked_steps = "wrapper", "a backend that is wrong on purpose", "this test", 0

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.batch_sizes: list[int] = []

    def encode_into(self, actions: Any, tokens: Any, stats: Any) -> None:
        self.batch_sizes.append(len(actions))
        self.backend.encode_into(actions, tokens, stats)

    def decode_into(self, tokens: Any, stats: Any, actions: Any) -> None:
        self.backend.decode_into(tokens, stats, actions)

    def close(self) -> None:
        self.backend.close()


def test_reading_gives_what_was_written(case: tuple[Golden, ModelEntry, Backend]) -> None:
    golden, model, _ = case
    assert_equal(read_golden(write_golden(golden), model), golden)


def test_numpy_reads_it_without_pickle(golden: Golden) -> None:
    with np.load(io.BytesIO(write_golden(golden)), allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["tokens"], golden.tokens)


def test_the_bytes_depend_on_the_content_alone(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write_golden(golden)
    monkeypatch.setattr("time.time", lambda: 2e9)
    monkeypatch.setattr("sys.platform", "win32")
    assert write_golden(replace(golden, decoded=dict(reversed(golden.decoded.items())))) == first


def test_every_member_says_that_it_is_as_old_as_a_zip_can_be_and_made_by_unix(golden: Golden) -> None:
    """Other dates or systems are other bytes, which would not be read any more."""
    with zipfile.ZipFile(io.BytesIO(write_golden(golden))) as archive:
        stated = {(entry.date_time, entry.create_system) for entry in archive.infolist()}
    assert stated == {((1980, 1, 1, 0, 0, 0), 3)}


def test_what_is_read_cannot_be_changed(golden: Golden) -> None:
    with pytest.raises(ValueError, match="read-only"):
        golden.tokens[0] = 0


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 cut off"])
def test_bytes_that_are_no_archive_are_refused(content: bytes, model: ModelEntry) -> None:
    with pytest.raises(BundleError, match=r"golden\.npz is not an \.npz"):
        read_golden(content, model)


def test_truncation_anywhere_is_refused(golden: Golden, model: ModelEntry) -> None:
    content = write_golden(golden)
    for length in np.linspace(0, len(content) - 1, 50).astype(int):
        with pytest.raises(BundleError, match=r"golden\.npz"):
            read_golden(content[:length], model)


def test_a_compressed_member_is_refused_unread(
    golden: Golden, model: ModelEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = archive_of(members(write_golden(golden)), deflated=["tokens.npy"])
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_arguments: pytest.fail("read"))
    with pytest.raises(BundleError, match="compressed"):
        read_golden(content, model)


def test_pickles_are_refused_unread(golden: Golden, model: ModelEntry) -> None:
    class Exploding:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return pytest.fail, ("unpickled",)

    files = members(write_golden(golden))
    files["actions.npy"] = npy(np.array([Exploding()], dtype=object), allow_pickle=True)
    with pytest.raises(BundleError, match="bytes of actions; expected one or more whole chunks"):
        read_golden(archive_of(files), model)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (
            "tokens.npy",
            np.zeros((6, 2, 4, 2), np.int32),
            r"tokens\.npy that begins with .*\(6, 2, 4, 2\).*needs int32\[6, 2, 4, 3\]",
        ),
        ("tokens.npy", np.zeros((6, 2, 4, 3), np.int64), r"tokens\.npy that begins with .*<i8.*needs int32"),
        ("actions.npy", np.zeros((0, 2, 3), np.float32), "has 0 bytes of actions; expected one or more whole chunks"),
        ("actions.npy", np.float32(0), "has 4 bytes of actions; expected one or more whole chunks"),
        ("near_tie_cap.npy", np.zeros(1, np.int64), r"near_tie_cap\.npy that begins with .*needs int64\[\]"),
        ("margins.npy", np.asfortranarray(np.zeros((6, 2, 4, 3), np.float32)), r"margins\.npy that begins with .*True"),
        ("actions.npy", np.full((6, 2, 3), np.nan, np.float32), "actions beyond the model's action_limit"),
        ("tokens.npy", np.full((6, 2, 4, 3), 5, np.int32), r"tokens outside 0 \.\.\. 4"),
        ("tokens.npy", np.full((6, 2, 4, 3), -1, np.int32), r"tokens outside 0 \.\.\. 4"),
        ("margins.npy", np.full((6, 2, 4, 3), np.inf, np.float32), "margins that are negative or not finite"),
        ("bounds.npy", np.full((6, 2, 4, 3), np.nan, np.float32), "bounds that are negative or not a number"),
        ("decoded_3.npy", np.full((6, 2, 3), np.nan), "decoded actions that are not finite"),
        ("bounds.npy", np.full((6, 2, 4, 3), np.inf, np.float32), "bounds that float32's rounding does not explain"),
        ("bounds.npy", np.full((6, 2, 4, 3), 50, np.float32), "bounds that float32's rounding does not explain"),
        ("bounds.npy", np.full((6, 2, 4, 3), 1e-3, np.float32), "bounds that float32's rounding does not explain"),
        ("near_tie_cap.npy", np.int64(-1), "a near_tie_cap of -1, not from 0 to 35"),
        ("near_tie_cap.npy", np.int64(36), "a near_tie_cap of 36, not from 0 to 35"),
        ("flip_tolerance.npy", np.float64(np.nan), "a flip_tolerance of nan, not from 0 to 10"),
        ("flip_tolerance.npy", np.float64(10.1), "a flip_tolerance of 10.1, not from 0 to 10"),
        ("flip_tolerance.npy", np.float64(1e300), r"a flip_tolerance of 1e\+300, not from 0 to 10"),
    ],
)
def test_members_that_do_not_fit_the_model_are_refused(
    name: str, array: np.ndarray, message: str, golden: Golden, model: ModelEntry
) -> None:
    with pytest.raises(BundleError, match=message):
        read_golden(archive_of({**members(write_golden(golden)), name: npy(array)}), model)


LIMIT = np.float32(8)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("actions", LIMIT, None),
        ("actions", -LIMIT, None),
        ("actions", np.nextafter(LIMIT, np.inf), "actions beyond the model's action_limit"),
        ("actions", np.nextafter(-LIMIT, -np.inf), "actions beyond the model's action_limit"),
        ("tokens", 4, None),
        ("tokens", 5, r"tokens outside 0 \.\.\. 4"),
        ("margins", 0, None),
        ("margins", -1e-9, "margins that are negative or not finite"),
        ("margins", np.inf, "margins that are negative or not finite"),
        ("bounds", 0, None),
        ("bounds", -1e-9, "bounds that are negative or not a number"),
        ("bounds", np.nan, "bounds that are negative or not a number"),
        ("stats", 0, None),
        ("stats", np.nan, "stats that are not finite"),
        ("stats", -np.inf, "stats that are not finite"),
        ("decoded", 0, None),
        ("decoded", np.nan, "decoded actions that are not finite"),
        ("flip_tolerance", 0, None),
        ("flip_tolerance", 10, None),
        ("flip_tolerance", 10.1, r"a flip_tolerance of 10\.1, not from 0 to 10"),
    ],
)
def test_a_single_number_may_be_at_its_limit_and_not_beyond(
    name: str, value: float, message: str | None, bundle_of: Callable[[Recipe], Path]
) -> None:
    opened = open_bundle(bundle_of(Recipe(mode=DeployMode.DYNAMIC)))
    model = replace(opened.manifest.model, action_limit=float(LIMIT))
    golden = read_golden(opened.content(GOLDEN_NAME), model)
    if name == "flip_tolerance":
        golden = replace(golden, flip_tolerance=value)
    else:
        array = (golden.decoded[3] if name == "decoded" else getattr(golden, name)).copy()
        array.flat[array.size // 2] = value
        golden = replace(golden, **{name: {**golden.decoded, 3: array} if name == "decoded" else array})
    if message is None:
        assert_equal(read_golden(write_golden(golden), model), golden)
    else:
        with pytest.raises(BundleError, match=rf"golden\.npz has {message}; copy"):
            read_golden(write_golden(golden), model)


@pytest.mark.parametrize(("distance", "passes"), [(1, True), (-1, True), (0.999, False), (-0.999, False)])
def test_actions_reach_a_tenth_of_a_unit_from_the_middle(
    distance: float, passes: bool, golden: Golden, model: ModelEntry
) -> None:
    model = replace(model, action_units=(10.0,) * 3, action_offset=(8.0,) * 3, action_limit=20.0)
    content = write_golden(replace(golden, actions=np.full_like(golden.actions, 8 + distance)))
    if passes:
        read_golden(content, model)
    else:
        with pytest.raises(BundleError, match="has actions that do not span the model's action_units; copy"):
            read_golden(content, model)


@pytest.mark.parametrize("mode", list(DeployMode))
def test_no_bounds_hide_a_first_layer_that_another_model_made(
    mode: DeployMode, bundle_of: Callable[[Recipe], Path]
) -> None:
    """The widest bounds that are read, and the highest cap, against the encoder of another model."""
    opened, other = open_bundle(bundle_of(Recipe(mode=mode))), open_bundle(bundle_of(Recipe(mode=mode, seed=9)))
    model = opened.manifest.model
    golden = read_golden(opened.content(GOLDEN_NAME), model)
    widest = (0.99 * np.array(highest_bounds(model.num_levels, model.num_layers)) + 0 * golden.bounds).astype(
        np.float32
    )
    excused = int((golden.margins <= widest).sum())
    widened = replace(golden, bounds=widest, flip_tolerance=GATES.flip_error, near_tie_cap=excused)
    widened = read_golden(write_golden(widened), model)
    failed = replay(widened, model, create_backend("onnxruntime", other)).failures
    assert any("wrong tokens" in check.gate for check in failed)


@pytest.mark.parametrize(("chunks", "most"), [(1, 1), (5, 2), (6, 2)])
def test_a_few_bounds_may_be_of_steps_that_float32_cannot_judge_but_no_more(
    chunks: int, most: int, golden: Golden, model: ModelEntry
) -> None:
    """Of the 8 tokens that each chunk has in a layer, one in twenty, and one of any number."""
    golden = with_chunks(golden, chunks)
    bounds = golden.bounds.copy()
    bounds[0, 0, :most, 0] = np.inf
    assert read_golden(write_golden(replace(golden, bounds=bounds)), model).bounds[0, 0, 0, 0] == np.inf
    bounds[0, 0, most, 0] = np.inf
    with pytest.raises(BundleError, match="bounds that float32's rounding does not explain"):
        read_golden(write_golden(replace(golden, bounds=bounds)), model)


def test_the_latents_of_one_dynamic_step_are_one_of_those(golden: Golden, model: ModelEntry) -> None:
    """They share a deviation, and with it the bound: of a chunk alone, all 4 of one step, but none of another."""
    model = replace(model, mode="dynamic")
    golden = with_chunks(golden, 1)
    golden = replace(golden, stats=np.zeros(model.stats_shape(1), np.float32), beliefs=None)
    bounds = golden.bounds.copy()
    bounds[0, 0, :, 0] = np.inf
    assert (read_golden(write_golden(replace(golden, bounds=bounds)), model).bounds[0, 0, :, 0] == np.inf).all()
    bounds[0, 1, 0, 0] = np.inf
    with pytest.raises(BundleError, match="bounds that float32's rounding does not explain"):
        read_golden(write_golden(replace(golden, bounds=bounds)), model)


def test_every_bound_may_be_as_wide_as_float32_explains(golden: Golden, model: ModelEntry) -> None:
    # With so many levels that is half a bin, a number that float32 has.
    model = replace(model, num_levels=5001)
    golden = replace(golden, margins=np.ones_like(golden.margins), beliefs=None)
    wide, wider = (np.where(np.arange(3) == 0, bound, golden.bounds) for bound in (0.5, np.float32(0.5000001)))
    read_golden(write_golden(replace(golden, bounds=wide.astype(np.float32))), model)
    with pytest.raises(BundleError, match="bounds that float32's rounding does not explain"):
        read_golden(write_golden(replace(golden, bounds=wider.astype(np.float32))), model)


def test_bounds_that_excuse_most_tokens_are_refused_in_layers_as_fine_as_rounding_too(
    golden: Golden, model: ModelEntry
) -> None:
    """A margin that is as wide as its bound is excused."""
    margins = golden.margins.copy()
    margins[:, :, :3, 1:] = golden.bounds[:, :, :3, 1:]  # 72 of 144
    read_golden(write_golden(replace(golden, margins=margins)), model)
    margins[0, 0, 3, 1] = golden.bounds[0, 0, 3, 1]
    with pytest.raises(BundleError, match="bounds that excuse 73 of 144 tokens"):
        read_golden(write_golden(replace(golden, margins=margins)), model)


def test_a_header_that_promises_more_than_there_is_is_refused(golden: Golden, model: ModelEntry) -> None:
    files = members(write_golden(golden))
    for name in files:
        with pytest.raises(BundleError, match=r"bytes of (data in|actions)"):
            read_golden(archive_of({**files, name: files[name] + b"\0"}), model)


def with_header(text: str, data: bytes = b"") -> bytes:
    header = text.encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


@pytest.mark.parametrize("name", ["actions.npy", "tokens.npy", "near_tie_cap.npy"])
@pytest.mark.parametrize(
    "text",
    [
        # Each of these made numpy's own reader raise something else than ValueError, or overflow.
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2305843009213693952, 2, 3)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 2, 3)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 5000 + ", 2, 3)}",
        "{'descr': [('a', '<f4', (100000, 100000, 100000))], 'fortran_order': False, 'shape': (1, 2, 3)}",
        "{'descr': {'names': 1}, 'fortran_order': False, 'shape': (1, 2, 3)}",
        "{'descr': '<f4', 1: 2, 'shape': (1, 2, 3)}",
        "{[]: 1}",
        "(" * 3000,
        "-" * 3000 + "1",
        "",
    ],
)
def test_hostile_headers_are_never_interpreted(
    name: str, text: str, golden: Golden, model: ModelEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = members(write_golden(golden))
    for reader in ("read_magic", "read_array_header_1_0", "read_array"):
        monkeypatch.setattr(np.lib.format, reader, lambda *_arguments: pytest.fail("interpreted"))
    for data in (b"", files[name][128:]):
        with pytest.raises(BundleError, match=r"golden\.npz has"):
            read_golden(archive_of({**files, name: with_header(text, data)}), model)


def test_headers_are_those_of_numpy(golden: Golden) -> None:
    files = members(write_golden(golden))
    assert files["tokens.npy"] == npy(golden.tokens, version=(1, 0))


def test_bytes_before_after_and_between_the_members_are_refused(golden: Golden, model: ModelEntry) -> None:
    content = write_golden(golden)
    shifted = io.BytesIO(b"junk" + content)
    with zipfile.ZipFile(shifted, "a") as archive:
        archive.comment = b"noted"
    for other in (content + b"junk", b"junk" + content, shifted.getvalue(), archive_of(members(content))):
        with pytest.raises(BundleError, match=r"golden\.npz (is not an \.npz|holds more than its arrays)"):
            read_golden(other, model)


def with_directory(content: bytes, repeat: int, rename: bool) -> bytes:
    """`content` whose largest member stands `repeat` more times in the directory, over the same bytes."""
    end = content.rindex(b"PK\x05\x06")
    start = struct.unpack("<I", content[end + 16 : end + 20])[0]
    directory = content[start:end]
    at = directory.index(b"tokens.npy") - 46
    entry = directory[at : at + 46 + len(b"tokens.npy")]
    for number in range(repeat):
        name = f"tok{number:07d}".encode() if rename else b"tokens.npy"
        directory += entry[:46] + name
    count = struct.pack("<HHIIH", 0, 0, len(directory), start, 0)
    return content[:start] + directory + b"PK\x05\x06\0\0\0\0" + count


@pytest.mark.parametrize(("rename", "message"), [(False, "members of the same name"), (True, "larger than itself")])
def test_members_that_share_bytes_are_refused_unread(
    rename: bool, message: str, golden: Golden, model: ModelEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = with_directory(write_golden(golden), 100, rename)
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_arguments: pytest.fail("read"))
    with pytest.raises(BundleError, match=message):
        read_golden(content, model)


def test_no_damage_to_what_lies_between_the_arrays_shows_as_another_error(golden: Golden, model: ModelEntry) -> None:
    content = write_golden(golden)
    random = np.random.default_rng(0)
    places = np.flatnonzero(np.frombuffer(content, "S1")[:-1] == b"P")
    places = [place for place in places if content[place : place + 2] == b"PK"]
    for _ in range(500):
        damaged = bytearray(content)
        for _ in range(random.integers(1, 4)):
            position = min(int(random.choice(places) + random.integers(170)), len(content) - 1)
            damaged[position] = random.integers(256)
        if damaged != content:
            with pytest.raises(BundleError, match=r"golden\.npz"):
                read_golden(bytes(damaged), model)


def test_a_sample_may_flip_as_often_as_its_share_and_the_scatter_explain(golden: Golden) -> None:
    def cap(cap: int, stride: int) -> int:
        return replace(golden, near_tie_cap=cap).every(stride).near_tie_cap

    assert cap(635, 1) == 635
    assert cap(635, 2) == 300 + 35
    # So few may all lie in the sample.
    assert [cap(few, 3) for few in (0, 2, 35)] == [0, 2, 35]


def test_missing_and_unknown_members_are_named(golden: Golden, model: ModelEntry) -> None:
    files = members(write_golden(golden))
    files["surprise.npy"] = files.pop("bounds.npy")
    with pytest.raises(BundleError, match=r"lacks \['bounds.npy'\] and has the unknown members \['surprise.npy'\]"):
        read_golden(archive_of(files), model)
    del files["actions.npy"]
    with pytest.raises(BundleError, match=r"lacks actions\.npy; copy"):
        read_golden(archive_of(files), model)


def test_the_exported_model_passes(case: tuple[Golden, ModelEntry, Backend]) -> None:
    result = replay(*case)
    assert result.passed, "\n".join(map(str, result.checks))
    assert result.failures == ()


def test_every_value_is_checked_and_in_batches_of_one_two_and_all(case: tuple[Golden, ModelEntry, Backend]) -> None:
    golden, model, backend = case
    wrapper = Wrapper(backend)
    result = replay(golden, model, wrapper)
    assert wrapper.batch_sizes == [1] * 6 + [2] * 3 + [6]
    for prefix in model.prefixes:
        assert sum(f"decode {prefix} layers" in check.gate for check in result.checks) == 3


@pytest.mark.parametrize(("chunks", "stride"), [(64, 1), (65, 2)])
def test_a_few_dozen_chunks_from_all_over_run_in_small_batches(
    chunks: int, stride: int, golden: Golden, model: ModelEntry, bundle: Path
) -> None:
    given: list[np.ndarray] = []

    class Recording(Wrapper):
        def encode_into(self, actions: Any, tokens: Any, stats: Any) -> None:
            given.append(actions.copy())
            super().encode_into(actions, tokens, stats)

    many = with_chunks(golden, chunks)
    assert replay(many, model, Recording(create_backend("onnxruntime", open_bundle(bundle)))).passed
    sample = many.actions[::stride]
    pairs = [sample[start : start + 2] for start in range(0, len(sample), 2)]
    for found, expected in zip(given, [*sample[:, None], *pairs, many.actions], strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_single_chunk_is_enough_and_what_passes_says_no_more_than_its_name(
    case: tuple[Golden, ModelEntry, Backend],
) -> None:
    golden, model, backend = case
    result = replay(golden.every(6), model, Wrapper(backend))
    assert result.passed
    stats = ["encode, batch 1: max |stats error|"] if model.has_stats else []
    assert [(check.gate, check.detail) for check in result.checks] == [
        (gate, "")
        for gate in (
            "encode, batch 1: wrong tokens",
            "encode, batch 1: near-tie flips",
            *stats,
            "decode 2 layers, batch 1: max |action error|",
            "decode 3 layers, batch 1: max |action error|",
            "encode and decode, batch 1: max |action error|",
        )
    ]


def test_checks_of_a_variant_say_so(golden: Golden, model: ModelEntry) -> None:
    class Idle:
        name, description, device, checked_steps = "idle", "a backend that does nothing", "this test", 2

        def encode_into(self, *_arrays: Any) -> None:
            """Writes nothing."""

        decode_into = encode_into

        def close(self) -> None:
            """Holds nothing."""

    class Varied(Idle):
        variants = {"bytes": Idle()}  # noqa: RUF012

    gates = [check.gate for check in replay(golden.every(6), model, Varied()).checks]
    assert gates == [
        "encode, batch 1: wrong tokens",
        "encode, batch 1: near-tie flips",
        "decode 2 layers, batch 1: max |action error|",
        "decode 3 layers, batch 1: max |action error|",
        "encode, batch 1, bytes: wrong tokens",
        "encode, batch 1, bytes: near-tie flips",
        "decode 2 layers, batch 1, bytes: max |action error|",
        "decode 3 layers, batch 1, bytes: max |action error|",
        "encode: illegal values accepted",
        "decode 2 layers: illegal values accepted",
        "decode 3 layers: illegal values accepted",
        "bytes, encode: illegal values accepted",
        "bytes, decode 2 layers: illegal values accepted",
        "bytes, decode 3 layers: illegal values accepted",
    ]


def test_one_wrong_token_fails_and_is_named(case: tuple[Golden, ModelEntry, Backend]) -> None:
    golden, model, backend = case
    safest = np.unravel_index(golden.margins[..., 0].argmax(), golden.margins.shape[:3])

    class OneWrong(Wrapper):
        def encode_into(self, actions: Any, tokens: Any, stats: Any) -> None:
            super().encode_into(actions, tokens, stats)
            if len(actions) == len(golden.actions):
                tokens[safest][0] = (tokens[safest][0] + 1) % model.num_levels

    failed = [str(check) for check in replay(golden, model, OneWrong(backend)).failures]
    assert len(failed) == 1
    assert failed[0].startswith(f"✗ encode, batch 6: wrong tokens: 1 > 0 (token {[*map(int, safest), 0]} is ")


@pytest.mark.parametrize(("excess", "passes"), [(0.9, True), (1.1, False)])
def test_actions_may_be_off_by_the_limit_and_no_more(
    excess: float, passes: bool, case: tuple[Golden, ModelEntry, Backend]
) -> None:
    golden, model, backend = case

    class Off(Wrapper):
        def decode_into(self, tokens: Any, stats: Any, actions: Any) -> None:
            super().decode_into(tokens, stats, actions)
            actions[..., 0] += excess * GATES.action_error * model.action_units[0]

    failed = replay(golden, model, Off(backend)).failures
    assert (not failed) == passes
    # One check per prefix and batch size, and the round trip.
    assert len(failed) == (0 if passes else 3 * (len(model.prefixes) + 1))


def test_what_is_not_written_is_wrong(case: tuple[Golden, ModelEntry, Backend]) -> None:
    golden, model, backend = case

    class Silent(Wrapper):
        def encode_into(self, actions: Any, tokens: Any, stats: Any) -> None:
            """Writes nothing."""

        def decode_into(self, tokens: Any, stats: Any, actions: Any) -> None:
            """Writes nothing."""

    failed = replay(golden, model, Silent(backend)).failures
    assert {check.gate.split(":")[0] for check in failed} >= {"encode, batch 1", "decode 3 layers, batch 6"}
    assert all(check.value > check.limit for check in failed)
    assert "is -1, expected" in failed[0].detail


def test_what_a_decoder_does_not_write_is_infinitely_wrong(case: tuple[Golden, ModelEntry, Backend]) -> None:
    golden, model, backend = case

    class Silent(Wrapper):
        def decode_into(self, tokens: Any, stats: Any, actions: Any) -> None:
            """Writes nothing."""

    failed = [check for check in replay(golden, model, Silent(backend)).failures if check.gate.startswith("decode")]
    assert len(failed) == 3 * len(model.prefixes)
    assert all(check.value == np.inf for check in failed)


@pytest.mark.parametrize("wrong", [1, 2, 8])
def test_a_decoder_of_chunk_tokens_that_errs_for_one_number_of_them_is_told_with_it(
    wrong: int, chunk_bundle: Path
) -> None:
    bundle = open_bundle(chunk_bundle)
    model = bundle.manifest.model
    golden = read_golden(bundle.content(GOLDEN_NAME), model)

    class Off(Wrapper):
        def decode_into(self, tokens: Any, stats: Any, actions: Any) -> None:
            super().decode_into(tokens, stats, actions)
            if tokens.shape[1] == wrong:
                actions[...] += 1

    failed = replay(golden, model, Off(create_backend("c", bundle))).failures
    assert {check.gate.split(",")[0] for check in failed} == {"decode fewer tokens"}
    assert all(check.detail.startswith(f"{wrong} tokens: ") for check in failed)


def test_a_backend_gets_arrays_that_it_may_write_to(case: tuple[Golden, ModelEntry, Backend]) -> None:
    golden, model, backend = case

    class Strict(Wrapper):
        def encode_into(self, actions: Any, tokens: Any, stats: Any) -> None:
            assert all(part is None or part.flags.carray for part in (actions, tokens, stats))
            super().encode_into(actions, tokens, stats)
            actions.fill(np.nan)

        def decode_into(self, tokens: Any, stats: Any, actions: Any) -> None:
            assert all(part is None or part.flags.carray for part in (tokens, stats, actions))
            super().decode_into(tokens, stats, actions)

    assert replay(golden, model, Strict(backend)).passed


@pytest.mark.parametrize(
    ("value", "detail", "line"),
    [
        (1.0, "", "✓ a gate: 1 ≤ 1"),
        (0.0, "how many", "✓ a gate: 0 ≤ 1 (how many)"),
        (1.0000001, "", "✗ a gate: 1 > 1"),
        (np.nan, "where", "✗ a gate: nan > 1 (where)"),
    ],
)
def test_a_check_passes_up_to_its_limit(value: float, detail: str, line: str) -> None:
    check = Check("a gate", value, 1.0, detail)
    assert check.passed == line.startswith("✓")
    assert str(check) == line


def test_all_failures_are_collected_when_a_backend_raises(case: tuple[Golden, ModelEntry, Backend]) -> None:
    golden, model, backend = case

    class Broken(Wrapper):
        def decode_into(self, *_arrays: Any) -> None:
            raise InferenceError("out of memory")

    failed = replay(golden, model, Broken(backend)).failures
    assert len(failed) == 3 * (len(model.prefixes) + 1)
    assert all("out of memory" in str(check) for check in failed)


def test_an_encoder_that_raises_fails_in_every_batch_and_with_illegal_values(
    case: tuple[Golden, ModelEntry, Backend],
) -> None:
    golden, model, backend = case

    class Broken(Wrapper):
        #: It marks illegal values, or would.
        token_types = (np.dtype(np.int32),)

        def encode_into(self, *_arrays: Any) -> None:
            raise InferenceError("out of memory")

    gates = ["encode, batch 1", "encode, batch 2", "encode, batch 6", "illegal values"]
    failed = replay(golden, model, Broken(backend)).failures
    assert [str(check) for check in failed] == [f"✗ {gate}: inf > 0 (out of memory)" for gate in gates]


@pytest.mark.parametrize(("excess", "passes"), [(0.9, True), (1.1, False)])
def test_stats_may_be_off_by_the_limit_and_no_more(
    excess: float, passes: bool, bundle_of: Callable[[Recipe], Path]
) -> None:
    opened = open_bundle(bundle_of(Recipe(mode=DeployMode.DYNAMIC)))
    model = opened.manifest.model
    golden = read_golden(opened.content(GOLDEN_NAME), model)

    class OffStats(Wrapper):
        def encode_into(self, actions: Any, tokens: Any, stats: Any) -> None:
            super().encode_into(actions, tokens, stats)
            stats[0, 0, 0, 1] += excess * GATES.stats_error

    failed = replay(golden, model, OffStats(create_backend("onnxruntime", opened))).failures
    stats_failed = [check for check in failed if check.gate.endswith("max |stats error|")]
    # In batches of one, two and all.
    assert len(stats_failed) == (0 if passes else 3)
    assert all(re.match(r"stats\[\d, 0, 0, 1\] is ", check.detail) for check in stats_failed)


def flip_one(golden: Golden) -> tuple[Golden, tuple[int, ...]]:
    """Golden vectors in which one token of the last layer is declared a near-tie."""
    index = (0, 0, 0, golden.tokens.shape[-1] - 1)
    bounds = golden.bounds.copy()
    bounds[index] = golden.margins[index] + 1
    return replace(golden, bounds=bounds, near_tie_cap=1), index


@pytest.mark.parametrize(
    ("cap", "tolerance", "expected"),
    [(1, 10.0, []), (0, 10.0, ["near-tie flips"]), (1, 0.0, ["1 steps with a near-tie flip"])],
)
def test_near_tie_flips_are_capped_and_judged_by_their_action(
    cap: int, tolerance: float, expected: list[str], golden: Golden, model: ModelEntry, bundle: Path
) -> None:
    golden, index = flip_one(golden)
    golden = replace(golden, near_tie_cap=cap, flip_tolerance=tolerance)

    class Flips(Wrapper):
        def encode_into(self, actions: Any, tokens: Any, stats: Any) -> None:
            super().encode_into(actions, tokens, stats)
            if len(actions) == len(golden.actions):
                tokens[index] += 1 if tokens[index] == 0 else -1

    result = replay(golden, model, Flips(create_backend("onnxruntime", open_bundle(bundle))))
    assert len(result.failures) == len(expected)
    for check, part in zip(result.failures, expected, strict=True):
        assert part in check.gate
    details = {check.gate: check.detail for check in result.checks}
    assert details["encode, batch 6: near-tie flips"] == "per layer [0, 0, 1], 0 tokens behind them"
