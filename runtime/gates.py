"""The parity gates' limits: every number that decides whether an engine is equal to the reference."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gates:
    """Limits that a backend's answers are held against; `found <= limit` passes."""

    # Float32 rounding explains every difference that is a near-tie. Any other has a cause that must be found.
    wrong_tokens: int = 0

    # Flips at near-ties, as a multiple of those that torch's float32 has on the same data. Two correct float32
    # implementations round independently, so one may flip where the other does not and the counts scatter around each
    # other; twice is room for that, while TF32 (thousands of times the rounding) exceeds it a hundredfold.
    near_tie_ratio: float = 2.0

    # Largest |action error| in normalised units (the scale the decoder was trained on, about [-1, 1]). Two layers of 64
    # terms in float32 stay near 1e-6; TF32 is at 3e-4. A robot resolves about 1e-4 of its range.
    action_error: float = 1e-5

    # Illegal values that a backend takes for legal ones, or does not mark, where it promises to check them. Nobody else
    # looks at these values: each one could reach a robot as a motion.
    illegal_values: int = 0

    # Largest |error| of mean and sigma in latent units (tanh range), `dynamic` only. Both are sums of D latents that
    # are themselves good to about 1e-6 in float32.
    stats_error: float = 1e-5


GATES = Gates()
