"""What can be chosen for a training; torch is not needed to choose."""

from dataclasses import dataclass
from enum import StrEnum

from rfsq.rfsq_ref.errors import SettingsError


class NormaliserKind(StrEnum):
    """What is mapped onto [-1, 1] (`min-max`, `quantile`) or onto zero mean and unit deviation (`mean-std`)."""

    MIN_MAX = "min-max"
    QUANTILE = "quantile"
    MEAN_STD = "mean-std"


#: What a command takes for `--normaliser`.
NORMALISER_CHOICES = ("auto", "none", *NormaliserKind)


@dataclass(frozen=True)
class TrainConfig:
    """use_layernorm: `dynamic` conditioning (Robust RFSQ) or `none` (naive); num_episodes: 0 = all for training.

    patience: stop after so many epochs without a lower validation error, 0 = never; it belongs to a long run: with
    the cosine schedule the last epochs gain most. device: as torch names it, "cpu" or "cuda".
    """

    use_layernorm: bool = True
    epochs: int = 100
    num_episodes: int = 0
    batch_size: int = 64
    learning_rate: float = 1e-3
    seed: int = 0
    latent_dim: int = 16
    hidden_width: int = 64
    num_layers: int = 8
    num_levels: int = 7
    normaliser: NormaliserKind | None = None
    patience: int = 25
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name, nothing in (("num_episodes", "all"), ("patience", "never stop early")):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} is {getattr(self, name)}; expected 0 ({nothing}) or more")
        if not self.learning_rate > 0:
            raise SettingsError(f"learning_rate is {self.learning_rate}; expected more than 0")
        if not -(2**63) <= self.seed < 2**64:
            raise SettingsError(f"seed is {self.seed}; expected one of 64 bits")
