"""The page: HTML that needs nothing else. It loads nothing, and what the data name is text and never markup."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from ..bundle.arrays import FloatArray
from ..bundle.manifest import Manifest
from ..bundle.models import ChunkModel
from ..bundle.modes import MEANING
from ..bundle.paths import counted
from .measure import Explanation, ShownChunk, ShownClass

#: Significant digits of every number: far finer than a screen.
_DIGITS = 5
_KIND = {
    True: "One chunk is {tokens} of {vocabulary:,} values, which code its {steps} together. Any first few of them "
    "decode; each further one makes the result better. Move the slider, and see how.",
    False: "Each step of a chunk is {tokens} of {vocabulary} values, in {layers}. The first layers decode alone, where "
    "the bundle has a decoder for them; the others make the result better. Move the slider, and see how.",
}


def page(found: Explanation, manifest: Manifest, facts: dict[str, str]) -> str:
    """HTML of one page. facts: where it comes from, for its end."""
    model, texts = manifest.model, {name: _text(name) for name in ("page.html", "page.css", "page.js")}
    is_chunk = isinstance(model, ChunkModel)
    introduction = _KIND[is_chunk].format(
        tokens=counted(model.depth if is_chunk else int(np.prod(model.token_grid[1:])) * model.depth, "token"),
        vocabulary=model.vocabulary,
        steps=counted(model.chunk_length, "step"),
        layers=counted(model.depth, "layer"),
    )
    if model.has_stats:
        introduction += (
            " Decoding takes the side information that encoding gives beside the tokens; the bits here leave it out."
        )
    made = {"model": f"{model.mode}: {MEANING[model.mode]}", "sizes": model.sizes_text, **facts}
    return Template(texts["page.html"]).substitute(
        policy=f"default-src 'none'; style-src {_hash(texts['page.css'])}; script-src {_hash(texts['page.js'])}",
        title=f"What each further {model.depth_unit.removesuffix('s')} adds",
        introduction=html.escape(introduction),
        unit=model.depth_unit.capitalize(),
        unit_small=model.depth_unit,
        counted=html.escape(
            f"All: {counted(found.counted, 'chunk')} of the {found.num_chunks:,} in the data. Errors are in "
            "normalised units: 1 is half of the range that the tokenizer was fitted for, in each dimension. The "
            "RMS error of a chunk is over all its steps and dimensions."
        ),
        made="\n".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in made.items()),
        style=texts["page.css"],
        script=texts["page.js"],
        data=_data(found, manifest),
    )


def _text(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Of an inline style or script, as a policy names it: nothing else on the page runs."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _data(found: Explanation, manifest: Manifest) -> str:
    """What the script reads, as JSON that ends no <script>."""
    model = manifest.model
    units, offset = np.array(model.action_units), np.array(model.action_offset)
    content: dict[str, Any] = {
        "names": found.names,
        "unit": model.depth_unit,
        "prefixes": found.prefixes,
        "bits": _numbers(np.array(found.bits)),
        "bounds": found.bounds,
        "units": _numbers(units),
        "low": _numbers(offset - units),
        "high": _numbers(offset + units),
        "largest": _numbers(found.largest),
        "position_unit": found.position_unit,
        "median": _numbers(found.median),
        "p99": _numbers(found.p99),
        "chunks": [_fields(chunk) for chunk in found.chunks],
        "classes": {number: _fields(shown) for number, shown in found.classes.items()},
    }
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _fields(record: ShownChunk | ShownClass) -> dict[str, Any]:
    return {name: _numbers(value) if isinstance(value, np.ndarray) else value for name, value in vars(record).items()}


def _numbers(values: FloatArray) -> Any:
    """Nested lists of numbers, as short as they may be."""
    flat = [float(f"{value:.{_DIGITS}g}") for value in values.ravel().tolist()]
    return np.array(flat, dtype=np.float64).reshape(values.shape).tolist()
