"""The generated C of random models: written into a folder, compiled, and called from numpy."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rfsq.export.c_builder import C_FLAGS, HEADER_NAME, SOURCE_NAME
from rfsq.export.c_source import belief_name, decoder_name
from rfsq.export.plan import DecoderPlan, EncoderPlan, plan_decoder, plan_encoder
from tests.bundles import Deployed, Recipe, generate_c

Array = npt.NDArray[Any]

FOLDER = Path(__file__).parent / "c"
#: What stands in every output before a call.
UNTOUCHED = 77
OK, ILLEGAL_VALUE = 0, 1


def plans(deployed: Deployed) -> tuple[EncoderPlan, list[DecoderPlan]]:
    model, mode, chunk_length = deployed.exported, deployed.recipe.mode, deployed.recipe.chunk_length
    decoders = [plan_decoder(model, mode, chunk_length, prefix) for prefix in deployed.prefixes]
    return plan_encoder(model, mode, chunk_length), decoders


def write_code(folder: Path, deployed: Deployed) -> Path:
    """Header and source in `folder`, which is also returned."""
    folder.mkdir(parents=True, exist_ok=True)
    generated = generate_c(deployed)
    (folder / HEADER_NAME).write_text(generated.header, encoding="utf-8")
    (folder / SOURCE_NAME).write_text(generated.source, encoding="utf-8")
    return folder


def without_checks(folder: Path) -> None:
    """Lets the source in `folder` accept every value, as where another thread writes after the checks have looked."""
    source = (folder / SOURCE_NAME).read_text(encoding="utf-8")
    accepting = source.replace("    return !illegal;\n", "    (void)illegal;\n    return 1;\n")
    assert accepting.count("(void)illegal;") >= 2
    (folder / SOURCE_NAME).write_text(accepting, encoding="utf-8")


def run(command: Sequence[object], folder: Path) -> str:
    """What a program prints that ends well."""
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def compile_program(
    folder: Path, main: Path, recipe: Recipe, *, compiler: str = "gcc", flags: Sequence[str] = C_FLAGS
) -> Path:
    """One of the programs of `FOLDER` with the source in `folder`."""
    depth = recipe.config.num_layers
    defines = [f"-DDECODE={decoder_name(depth)}", f"-DBELIEVE={belief_name(depth)}"]
    defines += ["-DHAS_STATS"] * recipe.mode.has_stats
    program = folder / main.stem
    run([compiler, *flags, *defines, "-I.", main, SOURCE_NAME, "-lm", "-o", program], folder)
    return program


class Library:
    """Functions return their status, and what they wrote over `UNTOUCHED`."""

    def __init__(
        self, folder: Path, deployed: Deployed, *, flags: Sequence[str] = C_FLAGS, compiler: str = "gcc"
    ) -> None:
        write_code(folder, deployed)
        run([compiler, *flags, "-fPIC", "-shared", SOURCE_NAME, "-o", "library.so"], folder)
        self.deployed, self.recipe, self.path = deployed, deployed.recipe, folder / "library.so"
        self._library = ctypes.CDLL(str(self.path))

    def encode(self, actions: Array, *, wants_stats: bool = True) -> tuple[int, Array, Array | None]:
        """actions float32 [N, T, A]; stats are None where the model has none."""
        config, steps = self.recipe.config, actions.shape[:2]
        tokens = self.place((*steps, config.latent_dim, config.num_layers), np.int32)
        if not self.recipe.mode.has_stats:
            return self._library.rfsq_encode(_at(actions), _count(actions), _at(tokens)), tokens, None
        stats = self.place((*steps, config.num_layers, 2), np.float32)
        pointer = _at(stats) if wants_stats else None
        return self._library.rfsq_encode(_at(actions), _count(actions), _at(tokens), pointer), tokens, stats

    def decode(self, tokens: Array, stats: Array | None = None) -> tuple[int, Array]:
        """tokens int32 [N, T, D, l], stats float32 [N, T, l, 2]."""
        decode = self._library[decoder_name(tokens.shape[-1])]
        actions = self.place((*tokens.shape[:2], self.recipe.config.action_dim), np.float32)
        arrays = [tokens] if stats is None else [tokens, stats]
        return decode(*map(_at, arrays), _count(tokens), _at(actions)), actions

    def believe(
        self,
        given: Array,
        *,
        is_logits: bool,
        keeps_mode: bool = False,
        coarse: int = 1,
        sharpness: Array | None = None,
        wants_all: bool = True,
    ) -> tuple[int, Array, Array, Array]:
        """given float32 [N, T, D, l, K] -> actions, deviations, mode_probability; without wants_all the first alone."""
        layers = given.shape[3]
        own = np.ones(layers, np.float32) if sharpness is None else sharpness
        actions = self.place((*given.shape[:2], self.recipe.config.action_dim), np.float32)
        deviations, mode_probability = self.place(actions.shape, np.float32), self.place(given.shape[:1], np.float32)
        terms = (int(is_logits), int(keeps_mode), coarse)
        others = map(_at, (deviations, mode_probability)) if wants_all else (None, None)
        function = self._library[belief_name(layers)]
        status = function(_at(given), _at(own), *terms, _count(given), _at(actions), *others)
        return status, actions, deviations, mode_probability

    def place(self, shape: tuple[int, ...], dtype: type) -> Array:
        """An array four bytes into a buffer, aligned to nothing more; filled with `UNTOUCHED`."""
        buffer: Array = np.full(int(np.prod(shape)) + 17, UNTOUCHED, dtype)
        offset = next(place for place in range(1, 17) if (buffer.ctypes.data + 4 * place) % 64 == 4)
        return buffer[offset : offset + int(np.prod(shape))].reshape(shape)


def _at(array: Array) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def _count(array: Array) -> ctypes.c_size_t:
    return ctypes.c_size_t(len(array))
