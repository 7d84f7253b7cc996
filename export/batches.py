"""Batch sizes that an engine is built for."""

from dataclasses import dataclass

from rfsq.export.errors import BuildInputError
from rfsq.runtime.backends.contract import MOST_CHUNKS


@dataclass(frozen=True)
class Profile:
    """Batch sizes B of an engine: smallest, tuned for, largest. T is fixed in the graph."""

    minimum: int = 1
    optimum: int = 1
    maximum: int = 4096

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimum <= self.maximum <= MOST_CHUNKS:
            raise BuildInputError(
                f"profile has minimum {self.minimum}, optimum {self.optimum}, maximum {self.maximum}; "
                f"expected 1 <= minimum <= optimum <= maximum <= {MOST_CHUNKS}"
            )
