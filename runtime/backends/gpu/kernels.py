"""CUDA kernels: compiled by NVRTC, loaded from an image, put on a stream. Needs cuda-python."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from cuda.bindings import driver, nvrtc

from ...bundle.advice import install
from ...bundle.errors import BackendUnavailableError, InferenceError, TokenizerError
from .driver import DEVICE, call, fail, is_usable, open_device

#: SHT_NOBITS of ELF: a section that takes no room in the file.
_WITHOUT_CONTENT = 8


class KernelError(TokenizerError):
    """NVRTC is missing or refuses the source; the message quotes it."""


def compile_kernels(source: str, name: str, compute_capability: str, *, may_fuse: bool = True) -> bytes:
    """Machine code for one kind of GPU, such as `9.0`; none has to be here. Raises KernelError.

    may_fuse: whether a product and a sum may become one operation, which rounds once.
    """
    # Here, because a robot compiles nothing.
    from cuda.core import Program, ProgramOptions

    arch = f"sm_{compute_capability.replace('.', '')}"
    try:
        options = ProgramOptions(name=name, arch=arch, std="c++17", fma=may_fuse)
        return bytes(Program(source, "c++", options).compile("cubin").code)
    except RuntimeError as error:
        raise _without_nvrtc(error) from error
    except Exception as error:  # cuda.core's own errors have no public base class
        raise KernelError(f"NVRTC refuses {name} for compute capability {compute_capability}: {error}") from error


def nvrtc_version() -> str:
    """Such as `NVRTC 13.0`. Raises KernelError without it."""
    try:
        _, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as error:
        raise _without_nvrtc(error) from error
    return f"NVRTC {major}.{minor}"


def _without_nvrtc(error: RuntimeError) -> KernelError:
    """error: what cuda-python raises where it does not find the library."""
    return KernelError(f"NVRTC cannot be used: {error}; install it with: {install('gpu')}")


class KernelLibrary:
    """Kernels on CUDA's device 0 until closed. Raises BackendUnavailableError for an image that the driver refuses."""

    def __init__(self, image: bytes) -> None:
        _check_image(image)
        self._image = np.frombuffer(image, np.uint8)
        try:
            self._library = call(driver.cuLibraryLoadData, self._image.ctypes.data, None, None, 0, None, None, 0)
        except InferenceError as error:
            raise BackendUnavailableError(
                f"the driver does not load the kernels: {error}; compile them on this machine, with --from-bundle"
            ) from error

    def find(self, name: str) -> Kernel | None:
        """None where there is none of this name."""
        error, kernel = driver.cuLibraryGetKernel(self._library, name.encode())
        return None if error else Kernel(kernel)

    def kernel(self, name: str) -> Kernel:
        """Raises BackendUnavailableError where there is none of this name."""
        if found := self.find(name):
            return found
        raise BackendUnavailableError(f"the engine has no kernel {name}; compile it again, with --from-bundle")

    def close(self) -> None:
        if is_usable():
            driver.cuLibraryUnload(self._library)


def _check_image(image: bytes) -> None:
    """The driver is not told where the image ends, and reads on beyond what was cut off."""
    try:
        if image[:5] != b"\x7fELF\x02":
            raise ValueError("it is no 64-bit ELF file")
        segments, sections = struct.unpack_from("<QQ", image, 0x20)
        segment_size, num_segments, size, count = struct.unpack_from("<HHHH", image, 0x36)
        if segments + segment_size * num_segments > len(image):
            raise ValueError(f"it has {len(image)} bytes, fewer than its headers say")
        for index in range(count):
            kind, _, _, start, length = struct.unpack_from("<IQQQQ", image, sections + index * size + 4)
            if kind != _WITHOUT_CONTENT and start + length > len(image):
                raise ValueError(f"it has {len(image)} bytes, and a section ends at {start + length}")
    except (struct.error, ValueError) as error:
        raise BackendUnavailableError(
            f"the engine is no image of CUDA kernels: {error}; compile it again, with --from-bundle"
        ) from error


class Kernel:
    """One kernel of a library, which has to stay open. threads: of a block, as many as it was compiled for."""

    def __init__(self, kernel: Any) -> None:
        # The driver takes a kernel of a library wherever it takes a function.
        self._kernel = driver.CUfunction(int(kernel))
        most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK
        self.threads = int(call(driver.cuKernelGetAttribute, most, kernel, DEVICE))

    @cached_property
    def resident_blocks(self) -> int:
        """How many blocks the GPU runs at once."""
        occupancy = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor
        return int(call(occupancy, self._kernel, self.threads, 0)) * open_device().multiprocessors

    def launch(self, blocks: int, arguments: KernelArguments, stream: int) -> None:
        """Raises InferenceError."""
        error = driver.cuLaunchKernel(
            self._kernel, blocks, 1, 1, self.threads, 1, 1, 0, stream, arguments.address, 0
        )[0]  # fmt: skip
        if error:
            fail(error)


class KernelArguments:
    """Addresses and numbers of 64 bits, as a launch takes them; may be set again before each.

    A kernel takes as many of them as it has parameters.
    """

    def __init__(self, count: int) -> None:
        self._values = (ctypes.c_uint64 * count)()
        size = ctypes.sizeof(ctypes.c_uint64)
        first = ctypes.addressof(self._values)
        self._pointers = (ctypes.c_void_p * count)(*(first + index * size for index in range(count)))
        self.address = ctypes.addressof(self._pointers)

    def set(self, values: Sequence[int]) -> None:
        self._values[:] = list(values)
