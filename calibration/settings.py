"""What can be chosen for a fit; torch is not needed to choose."""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from rfsq.calibration.errors import CalibrationError
from rfsq.runtime.bundle.reading import coerce_fields


class Method(StrEnum):
    """New, better tokens with fitted constants, or published tokens with a fitted decoder."""

    CALIBRATED = "calibrated"
    RECOVERED = "recovered"


class Objective(StrEnum):
    """What a layer's width follows: the coverage-quantile range of the residual, or its least squared error."""

    RANGE = "range"
    MSE = "mse"


class Granularity(StrEnum):
    """One mean and scale per layer, shared by its latents, or one per layer and latent."""

    LAYER = "layer"
    LATENT = "latent"


@dataclass(frozen=True)
class CalibrationConfig:
    """How conditioning constants are fitted.

    coverage: share of the data that each layer's bins take in (objective `range`), in (0, 1]; headroom: how much
    farther than that the first layer reaches (`range`), because new data go farther; not beyond [-1, 1].

    worst_case: latent error to aim at for any latent in [-1, 1]; 1 or more follows the data alone. objective and
    granularity are taken as text, too. The defaults are measured: docs/calibration.md.
    """

    objective: Objective = Objective.RANGE
    coverage: float = 1.0
    granularity: Granularity = Granularity.LAYER
    headroom: float = 0.1
    worst_case: float = 4e-4

    def __post_init__(self) -> None:
        coerce_fields(self, CalibrationError, _of_python)
        if not 0 < self.coverage <= 1:
            raise CalibrationError(
                f"coverage is {self.coverage}; expected a share of the data in (0, 1]: 1 covers all of it"
            )
        if not (math.isfinite(self.headroom) and self.headroom >= 0):
            raise CalibrationError(f"headroom is {self.headroom}; expected 0 or more: 0.1 reaches a tenth farther")
        if not (math.isfinite(self.worst_case) and self.worst_case > 0):
            raise CalibrationError(
                f"worst_case is {self.worst_case}; expected a positive latent error, like 4e-4; 1 turns it off"
            )


class ChunkNormaliser(StrEnum):
    """How actions come into [-1, 1], beyond which chunk tokens say nothing: `min-max` of all episodes and some more;
    `auto` is that where they are not of about that size, else `none`."""

    AUTO = "auto"
    NONE = "none"
    MIN_MAX = "min-max"


class BitOrder(StrEnum):
    """Which latents the first tokens refine: those of the class, for the least error, or the same in all classes, which
    a policy learns sooner."""

    OWN = "own"
    SHARED = "shared"


@dataclass(frozen=True)
class ChunkConfig:
    """Which chunk tokens to fit, and how.

    chunk_length: T, steps of a chunk; classes: C, with escape, fewer where the data have too few windows; vocabulary:
    words of a token, a power of two; tokens: L, of a chunk, None for about 8 bits of each value; normaliser: also the
    path of a JSON file with kind, offset and scale.
    """

    chunk_length: int = 8
    classes: int = 64
    vocabulary: int = 1024
    tokens: int | None = None
    normaliser: ChunkNormaliser | str = ChunkNormaliser.AUTO
    order: BitOrder = BitOrder.OWN
    seed: int = 0

    def __post_init__(self) -> None:
        coerce_fields(self, CalibrationError, _of_python)
        if not 16 <= self.vocabulary <= 2**16 or self.vocabulary.bit_count() != 1:
            raise CalibrationError(
                f"vocabulary is {self.vocabulary}; expected a power of two from 16 to {2**16:,}, such as 1024"
            )


class Target(StrEnum):
    """Which latents the first step regresses on: those the decoder was trained on, or those before the quantiser."""

    DEQUANTISED = "dequantised"
    UNQUANTISED = "unquantised"


class Weighting(StrEnum):
    """Weight of a step in the fit: all alike, or 1 / |normalised action|^2, so that slow motions count as much."""

    UNIFORM = "uniform"
    INVERSE_MAGNITUDE = "inverse-magnitude"


@dataclass(frozen=True)
class RecoveredConfig:
    """How recovered decoders are fitted.

    ridge: penalty on the squared distance from the map of the step before; None: cross-validated, and what does not
    win on episodes left out of the fit is left out of the map; refine_steps: most Gauss-Newton steps, 0 = none.
    """

    ridge: float | None = None
    refine_steps: int = 5
    target: Target = Target.DEQUANTISED
    weighting: Weighting = Weighting.UNIFORM

    def __post_init__(self) -> None:
        if self.ridge is not None and not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise CalibrationError(f"ridge is {self.ridge}; expected 0 or a small positive number, like 1e-6")
        if self.refine_steps < 0:
            raise CalibrationError(f"refine_steps is {self.refine_steps}; expected 0 (no refining) or more")


class ReadoutChoice(StrEnum):
    """Refit the last layer where cross-validation says that it wins, always, or never."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


@dataclass(frozen=True)
class ReadoutConfig:
    """Whether and how the decoder's last layer is refitted.

    ridge: penalty on changing what the layer gives, positive; None: the one with the lowest cross-validated error.

    choice is taken as text, too.
    """

    choice: ReadoutChoice = ReadoutChoice.AUTO
    ridge: float | None = None

    def __post_init__(self) -> None:
        coerce_fields(self, CalibrationError, _of_python)
        if self.ridge is not None and not (math.isfinite(self.ridge) and self.ridge > 0):
            raise CalibrationError(f"readout ridge is {self.ridge}; expected a small positive number, like 1e-2")
        if self.ridge is not None and self.choice is ReadoutChoice.OFF:
            raise CalibrationError(f"readout ridge is {self.ridge} with readout off; leave one of the two out")


def _of_python(value: Any) -> Any:
    """A number of numpy or torch as Python's own; everything else as it is."""
    return value.item() if hasattr(value, "item") else value


DEFAULT_CALIBRATION = CalibrationConfig()
DEFAULT_RECOVERED = RecoveredConfig()
DEFAULT_READOUT = ReadoutConfig()
READOUT_OFF = ReadoutConfig(ReadoutChoice.OFF)
