"""Arrays as an .npz of one spelling, and read from bytes that somebody else may have made.

Headers are compared with the ones they must be, never interpreted.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from .arrays import AnyArray

#: The system that a zip states as its maker: the same on all.
_ZIP_UNIX = 3
#: Of a file that is not the very bytes that `write_arrays` makes of its arrays.
NOT_AS_WRITTEN = "holds more than its arrays, or in another form than the build writes"
#: What an array must be: dtype and shape.
Form = tuple[type[np.generic], tuple[int, ...]]


def write_arrays(arrays: Mapping[str, AnyArray]) -> bytes:
    """The bytes of an .npz: the same for the same content, at any time and with any zlib (nothing is compressed)."""
    output = io.BytesIO()
    with zipfile.ZipFile(output, "w", zipfile.ZIP_STORED) as archive:
        for name, array in sorted(arrays.items()):
            # Without a date an entry has the earliest that a zip can state.
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.create_system = _ZIP_UNIX
            archive.writestr(entry, header(array.dtype, array.shape) + array.tobytes())
    return output.getvalue()


def read_members(content: bytes) -> dict[str, bytes]:
    """By their names, which end in .npy. Raises ValueError unless they lie there one by one as they are."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("its members are compressed")
            # Members of one name could read the same few bytes again and again.
            if len({entry.filename for entry in entries}) != len(entries):
                raise ValueError("it has members of the same name")
            if sum(entry.file_size for entry in entries) > len(content):
                raise ValueError("its members are larger than itself")
            return {entry.filename: archive.read(entry) for entry in entries}
    except Exception as error:  # Whatever zipfile trips over in bytes that someone made for that purpose
        raise ValueError(f"is not an .npz that the build writes: {error}") from error


def arrays_of(members: Mapping[str, bytes], expected: Mapping[str, Form]) -> dict[str, AnyArray]:
    """Read-only arrays by their names, all that are expected and no others. Raises ValueError."""
    wanted = {f"{name}.npy" for name in expected}
    if members.keys() != wanted:
        missing, unknown = sorted(wanted - members.keys()), sorted(members.keys() - wanted)
        raise ValueError(f"lacks {missing} and has the unknown members {unknown}")
    return {name: _read_array(f"{name}.npy", members[f"{name}.npy"], *form) for name, form in expected.items()}


def header(dtype: npt.DTypeLike, shape: tuple[int, ...]) -> bytes:
    """What stands before the data of such an array."""
    stream = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def _read_array(name: str, content: bytes, dtype: type[np.generic], shape: tuple[int, ...]) -> AnyArray:
    start = header(dtype, shape)
    if not content.startswith(start):
        raise ValueError(
            f"has {name} that begins with {content[: len(start)]!r}; the manifest's model needs "
            f"{np.dtype(dtype)}{list(shape)}"
        )
    # Python's numbers do not overflow.
    size, needed = len(content) - len(start), np.dtype(dtype).itemsize * math.prod(shape)
    if size != needed:
        raise ValueError(f"has {size} bytes of data in {name}; {np.dtype(dtype)}{list(shape)} takes {needed}")
    return np.frombuffer(content, dtype, offset=len(start)).reshape(shape)
