"""Tables and numbers as C and CUDA have them, and templates that are filled with them."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from rfsq.export.errors import BuildInputError

_TEMPLATES = Path(__file__).parent / "templates"
_NUMBERS_A_LINE = 6
Array = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]


def filled(template: str, **parts: object) -> str:
    """The template of this name, with each part in the place of the comment that names it."""
    text = (_TEMPLATES / template).read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(f"/* @{name}@ */", str(part))
    return text


def table(kind: str, name: str, values: Array | IntArray) -> str:
    """A constant array of one or two dimensions. kind: what stands in front of its name."""
    shape = "".join(f"[{size}]" for size in values.shape)
    return f"{kind} {name}{shape} = {{\n{_lines(values, ' ' * 4)}\n}};"


def number(value: float) -> str:
    """A float32 in C's exact spelling. Raises BuildInputError for NaN and for numbers beyond float32.

    >>> number(0.1)
    '0x1.99999a0000000p-4f'
    """
    if not abs(float(value)) <= float(np.finfo(np.float32).max):
        raise BuildInputError(
            f"a constant of the tokenizer is {value:g}, which float32 does not hold; the training diverged"
        )
    return f"{float(np.float32(value)).hex()}f"


def _lines(values: Array | IntArray, indent: str) -> str:
    if values.ndim > 1:
        return ",\n".join(f"{indent}{{\n{_lines(row, indent + ' ' * 4)}\n{indent}}}" for row in values)
    numbers = [str(value) if isinstance(value, np.integer) else number(value) for value in values]
    starts = range(0, len(numbers), _NUMBERS_A_LINE)
    return ",\n".join(indent + ", ".join(numbers[start : start + _NUMBERS_A_LINE]) for start in starts)
