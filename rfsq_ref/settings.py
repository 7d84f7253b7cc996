"""What can be chosen for a training; torch is not needed to choose."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from rfsq.rfsq_ref.errors import SettingsError


class TokenKind(StrEnum):
    """What a token is of: `step`, one control step, or `chunk`, all steps of a chunk together."""

    STEP = "step"
    CHUNK = "chunk"


class NormaliserKind(StrEnum):
    """What is mapped onto [-1, 1] (`min-max`, `quantile`) or onto zero mean and unit deviation (`mean-std`)."""

    MIN_MAX = "min-max"
    QUANTILE = "quantile"
    MEAN_STD = "mean-std"


#: What a command takes for `--normaliser`.
NORMALISER_CHOICES = ("auto", "none", *map(str, NormaliserKind))


def check_positive(settings: object, *names: str, error: type[Exception] = SettingsError) -> None:
    """Raise `error` where one of these whole numbers is below 1. names: of attributes of `settings`."""
    for name in names:
        value = getattr(settings, name)
        if value < 1:
            raise error(f"{name} is {value}; expected at least 1")


def check_tasks(tasks: Sequence[str], known: Iterable[str], error: type[Exception] = SettingsError) -> None:
    """Raise `error` unless there are tasks, all of them known and none named twice."""
    if not tasks or not {*tasks} <= {*known} or len({*tasks}) < len(tasks):
        raise error(f"tasks are {list(tasks)}; expected different ones of {list(known)}")


def check_seed(seed: int) -> None:
    """Raise SettingsError for one that torch does not take."""
    if not -(2**63) <= seed < 2**64:
        raise SettingsError(f"seed is {seed}; expected one of 64 bits")


@dataclass(frozen=True)
class TrainConfig:
    """What to train, and how.

    use_layernorm: `dynamic` conditioning (Robust RFSQ) or `none` (naive); num_episodes: 0 = all for training.

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
        check_positive(self, "epochs", "batch_size")
        for name, nothing in (("num_episodes", "all"), ("patience", "never stop early")):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} is {getattr(self, name)}; expected 0 ({nothing}) or more")
        if not self.learning_rate > 0:
            raise SettingsError(f"learning_rate is {self.learning_rate}; expected more than 0")
        check_seed(self.seed)
