"""Whatever a manifest holds, opening the bundle gives a bundle or a BundleError, and nothing else."""

import contextlib
import copy
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rfsq.runtime.bundle.errors import BundleError
from rfsq.runtime.bundle.folder import open_bundle
from rfsq.runtime.bundle.golden import read_golden
from rfsq.runtime.bundle.manifest import (
    GOLDEN_NAME,
    MANIFEST_NAME,
    manifest_text,
    parse_manifest,
)
from rfsq.runtime.bundle.models import StepModel
from tests.bundles import Recipe, deploy, make_manifest

TEXT = manifest_text(make_manifest(deploy(Recipe())))

numbers = st.one_of(
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**400, -(10**4000), 10**4299]),
    st.floats(),
    st.sampled_from([0.0, -0.0, 5e-324, 1e30, 1e308, 1.7e308]),
)
texts = st.one_of(
    st.text(),
    st.sampled_from(["", "\0", "..", "/", "\\", "a" * 5000, "\ud800", "𝔘", "e\u0301", "encoder.onnx/", "c", "cuda"]),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a tree of JSON, the root left out."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    return [(*path, key) for key in keys] + [place for key in keys for place in places(node[key], (*path, key))]


def resealed(content: Any) -> bytes:
    """In the manifest's spelling and with its own hash: whatever is wrong with it is not that it was altered."""
    body = json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False)
    digest = hashlib.sha256(body.encode(errors="surrogatepass")).hexdigest()
    text = json.dumps({**content, "manifest_sha256": digest}, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    return text.encode(errors="surrogatepass")


def opens_or_refuses(folder: Path, manifest: bytes) -> None:
    path = folder / MANIFEST_NAME
    original = path.read_bytes()
    try:
        path.write_bytes(manifest)
        with contextlib.suppress(BundleError):
            bundle = open_bundle(folder)
            read_golden(bundle.content(GOLDEN_NAME), bundle.manifest.model)
    finally:
        path.write_bytes(original)


def mutated(folder: Path, data: st.DataObject) -> Any:
    content = json.loads((folder / MANIFEST_NAME).read_bytes())
    del content["manifest_sha256"]
    known = places(content)
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, last = data.draw(st.sampled_from(known))
        node = content
        try:
            for key in parents:
                node = node[key]
            kind = data.draw(st.sampled_from(["replace", "remove", "add", "twice"]))
            if kind == "replace":
                node[last] = data.draw(values)
            elif kind == "remove":
                del node[last]
            elif kind == "add" and isinstance(node, dict):
                node[data.draw(texts)] = data.draw(values)
            elif isinstance(node, list):
                node.append(copy.deepcopy(node[last]))
        except (LookupError, TypeError):
            # An earlier change has taken the place away.
            continue
    return content


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=150)
def test_a_consistent_manifest_of_anything_opens_or_is_refused(altered_once: Path, data: st.DataObject) -> None:
    opens_or_refuses(altered_once, resealed(mutated(altered_once, data)))


@given(st.binary(max_size=300))
@example(b"")
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b"9" * 5000)
@example(b'{"schema_version": ' + b"9" * 5000 + b"}")
@example(b'{"schema_version": 2, "schema_version": 2}')
@example(b'{"schema_version": NaN}')
@example(b'{"schema_version": -Infinity}')
@example(b'{"schema_version": 1e999}')
@example(b"\xff\xfe{")
@example(b"\xef\xbb\xbf{}")
@example(b'{"\\ud800": 1, "schema_version": 2}')
@example(json.dumps({"schema_version": nested(900)}).encode())
@example(json.dumps({"schema_version": 2, "x" * 10**6: 1}).encode())
def test_any_bytes_open_or_are_refused(altered_once: Path, content: bytes) -> None:
    opens_or_refuses(altered_once, content)


@given(st.integers(0, len(TEXT.encode())), st.integers(0, 30), st.binary(max_size=30))
def test_any_splice_of_the_text_is_refused(start: int, length: int, inserted: bytes) -> None:
    content = TEXT.encode()
    changed = content[:start] + inserted + content[start + length :]
    try:
        text = changed.decode()
    except UnicodeDecodeError:
        return
    with contextlib.suppress(BundleError):
        assert manifest_text(parse_manifest(text)) == text == TEXT


@pytest.mark.slow
@given(
    st.sampled_from([field.name for field in dataclasses.fields(StepModel)]),
    values,
)
@example("chunk_length", 10**400)
@example("latent_dim", 10**4000)
@example("prefixes", [10**400])
@example("action_limit", 1e308)
@example("action_limit", 10**400)
@example("action_units", [1e308, 1.0, 1.0])
def test_any_model_opens_or_is_refused(altered_once: Path, name: str, value: Any) -> None:
    content = json.loads((altered_once / MANIFEST_NAME).read_bytes())
    del content["manifest_sha256"]
    content["model"][name] = value
    opens_or_refuses(altered_once, resealed(content))
