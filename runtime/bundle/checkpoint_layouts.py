"""The published checkpoint layouts, as far as a bundle can be compared with one: by the hashes of its tensors.

A bundle has no weights of its own to compare: they are folded into graphs, and `calibrated` and `recovered` decoders
are fitted anew. So a build writes down the hash of every tensor that it read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import AnyArray
from .manifest import Manifest
from .models import StepModel
from .paths import shown

#: In the manifest's provenance of the checkpoint: name to SHA-256, as `weight_hashes` gives them.
HASHES_KEY = "tensors"
#: There too: the label of the model that was chosen, where it was not the model itself.
WEIGHTS_KEY = "weights"

# Numbers as they are written, so that the name found is the name looked up.
GRID_NAME = re.compile(r"rfsq\.layers\.(0|[1-9][0-9]{0,8})\.boundaries")
#: Created by some versions of the published model and never used by its forward pass.
UNUSED_NAME = re.compile(r"rfsq\.layers\.(0|[1-9][0-9]{0,8})\.layernorm\.(weight|bias)")
#: The published grid is a float32 linspace; a file of lower precision has it rounded. What is further off is another.
GRID_TOLERANCE = 1e-6


@dataclass(frozen=True)
class StateComparison:
    """What sets a state dict apart from the bundle's checkpoint: names of tensors, and a line for each that differs."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()

    def problems(self, *, strict: bool = True) -> list[str]:
        """A line each; names that are missing or unexpected count where `strict`."""
        found = list(self.differences)
        if strict and self.missing:
            found.append(f"it lacks {', '.join(self.missing)}")
        if strict and self.unexpected:
            found.append(f"it has the unknown tensors {', '.join(self.unexpected)}")
        return found


def weight_hashes(weights: Mapping[str, AnyArray]) -> dict[str, str]:
    """SHA-256 of every tensor's numbers as little-endian float32 in C order."""
    return {
        name: hashlib.sha256(np.asarray(array, "<f4", order="C").tobytes()).hexdigest()
        for name, array in weights.items()
    }


def recorded_checkpoint(manifest: Manifest) -> Mapping[str, Any]:
    """What the build wrote down of its checkpoint; provenance is free-form, so it may be anything or nothing."""
    checkpoint = manifest.provenance.get("checkpoint")
    return checkpoint if isinstance(checkpoint, dict) else {}


def recorded_hashes(manifest: Manifest) -> dict[str, str] | None:
    """Those of the checkpoint that the bundle was built from; None where the build did not write them down."""
    hashes, model = recorded_checkpoint(manifest).get(HASHES_KEY), manifest.model
    if not isinstance(hashes, dict) or not isinstance(model, StepModel) or not _shapes(model).keys() <= hashes.keys():
        return None
    return {name: str(value) for name, value in hashes.items()}


def recorded_weights(manifest: Manifest) -> str | None:
    """Which model of a file that holds several the bundle was built from; None for the model itself."""
    label = recorded_checkpoint(manifest).get(WEIGHTS_KEY)
    return None if label is None else str(label)


def _shapes(model: StepModel) -> dict[str, tuple[int, ...]]:
    return weight_shapes(model.action_dim, model.latent_dim, model.hidden_width)


def weight_shapes(action_dim: int, latent_dim: int, hidden_width: int) -> dict[str, tuple[int, ...]]:
    """The autoencoder's tensors, by their published names."""
    sizes = {
        "encoder.0": (hidden_width, action_dim),
        "encoder.2": (latent_dim, hidden_width),
        "decoder.0": (hidden_width, latent_dim),
        "decoder.2": (action_dim, hidden_width),
    }
    return {
        f"{name}.{kind}": size if kind == "weight" else size[:1]
        for name, size in sizes.items()
        for kind in ("weight", "bias")
    }


def compare_config(config: object, model: StepModel) -> list[str]:
    """A line for everything that a published config says otherwise. It calls the latent dimension `hidden_dim`."""
    if not isinstance(config, Mapping):
        return [] if config is None else [f"its config is a {type(config).__name__}; expected a dict"]
    expected: dict[str, object] = {
        "action_dim": model.action_dim,
        "hidden_dim": model.latent_dim,
        "num_layers": model.num_layers,
        "num_levels": model.num_levels,
    }
    # Constants can be calibrated for either kind.
    if model.mode != "calibrated":
        expected["use_layernorm"] = model.mode != "none"
    return [
        f"its config says {name} = {shown(config[name])}, the bundle ({model.mode}) has {value!r}"
        for name, value in expected.items()
        if name in config and not _is_equal(config[name], value)
    ]


def _is_equal(found: object, expected: object) -> bool:
    try:
        return bool(found == expected)
    except (RuntimeError, ValueError):
        # Arrays and tensors of several numbers.
        return False


def is_grid(name: str) -> bool:
    """Whether this is the published name of a quantiser layer's grid."""
    return GRID_NAME.fullmatch(name) is not None


def compare_state(
    state: Mapping[str, AnyArray], hashes: Mapping[str, str], model: StepModel, *, resolution: float
) -> StateComparison:
    """state: float32 arrays by name; hashes: the bundle's; resolution: eps of the type that the file keeps grids in.

    Grids, which are the same for everybody, and what calibration fitted may be left out: a published file has the
    ones, a file of ours the others.
    """
    shapes = _shapes(model)
    grids = {f"rfsq.layers.{layer}.boundaries" for layer in range(model.num_layers)}
    found = {name: array for name, array in state.items() if not UNUSED_NAME.fullmatch(name)}
    hashed = weight_hashes({name: array for name, array in found.items() if name in hashes})
    grid = np.linspace(-1, 1, model.num_levels, dtype=np.float32)
    differences = []
    for name, array in sorted(found.items()):
        expected = shapes.get(name, grid.shape if name in grids else array.shape)
        if array.shape != expected:
            differences.append(f"{name} has shape {list(array.shape)}, the bundle's model {list(expected)}")
        elif name in hashes and hashed[name] != hashes[name]:
            differences.append(
                f"{name} has other numbers (sha256 {hashed[name][:8]}…, the bundle's {hashes[name][:8]}…)"
            )
        elif name in grids and not np.allclose(array, grid, rtol=0, atol=max(GRID_TOLERANCE, resolution)):
            differences.append(f"{name} is not linspace(-1, 1, {model.num_levels})")
    layers = sum(map(is_grid, found))
    if layers not in (0, model.num_layers):
        differences.append(f"it has {layers} quantiser layers, the bundle's model {model.num_layers}")
    return StateComparison(
        missing=tuple(sorted(shapes.keys() - found.keys())),
        unexpected=tuple(sorted(found.keys() - hashes.keys() - grids)),
        differences=tuple(differences),
    )
