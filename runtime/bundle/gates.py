"""The parity gates' limits: every number that decides whether an engine is equal to the reference."""

import itertools
import math
import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .backend_specs import BACKENDS

#: What the gates are called that judge a backend's promise about illegal values (`refusal.py`).
ACCEPTED, NOT_MARKED = "illegal values accepted", "illegal values not marked"
#: What the gates of beliefs are called.
BELIEF_GATES = ("action error", "std error", "mode probability error", "certain ones that differ")


@dataclass(frozen=True)
class Gates:
    """Limits that a backend's answers are held against; `found <= limit` passes."""

    # Float32 rounding explains every difference that is a near-tie. Any other has a cause that must be found.
    wrong_tokens: int = 0

    # Flips at near-ties (`near_tie_cap`), as a multiple of those that torch's float32 has on the same data. Two correct
    # float32 implementations round independently, so one may flip where the other does not and the counts scatter
    # around each other; twice is room for that where there are many, while TF32 (thousands of times the rounding)
    # exceeds it a hundredfold.
    near_tie_ratio: float = 2.0

    # And so many beside that multiple, since few flips tell little of their mean: where torch has none, another correct
    # implementation may well have two, and has them at every build on the same data. Both counts are taken for Poisson,
    # the other's mean for up to a quarter above torch's (9,684 flips to 7,796 are the farthest apart in ten million
    # steps). This is the least number with which a correct implementation fails with a probability below 1e-6, whatever
    # the means are; `tests/runtime/bundle/test_gates.py` computes it. What is no near-tie stays wrong: one is too many.
    near_tie_scatter: int = 35

    # Whatever torch's float32 has: the largest share of all tokens that may be near-tie flips. Models have about 5e-5;
    # where float32 decides one token of twenty by its rounding, the tokens of the last layers mean nothing.
    near_tie_share: float = 0.05

    # Largest |action error| in normalised units (the scale the decoder was trained on, about [-1, 1]). Two layers of 64
    # terms in float32 stay near 1e-6; TF32 is at 3e-4. A robot resolves about 1e-4 of its range. It judges what was
    # computed, not the last rounding of it to a float32 in physical units, which no implementation can avoid: half a
    # step of float32, 3e-5 where a joint rests a thousand units from zero, at most 3e-8 where actions are in [-1, 1]
    # (`action_errors` says how).
    action_error: float = 1e-5

    # Illegal values that a backend takes for legal ones, or does not mark, where it promises to check them. Nobody else
    # looks at these values: each one could reach a robot as a motion.
    illegal_values: int = 0

    # Largest |action error|, in normalised units, of a step with a near-tie flip, whatever the model's coding error:
    # the other side of a tie codes the same action. Ranges are about [-1, 1], or a few deviations wide.
    flip_error: float = 10.0

    # Largest |error| of mean and sigma in latent units (tanh range), `dynamic` only. Both are sums of D latents that
    # are themselves good to about 1e-6 in float32.
    stats_error: float = 1e-5

    # Largest |error| of a standard deviation of beliefs: a share of it, or of a hundredth of the largest of its chunk
    # where that is more. It is the root of a sum of squares, which float32 has to 1e-6; the derivatives in it cancel
    # where they are small. A robot that slows down by it needs one digit.
    std_error: float = 1e-4

    # Largest |error| of the probability of a mode: a softmax in float32 is good to 1e-6.
    mode_probability_error: float = 1e-5

    # Values that differ, in any bit, between tokens decoded and the same tokens as probabilities of 0 and 1.
    certain_differences: int = 0

    # What golden vectors may say that float32's rounding moves a token by. In latents, which lie in [-1, 1], K - 1 bins
    # of the first layer: two layers of 64 terms give 1e-5, and 3e-5 for actions far beyond the range, as a bound of 8
    # standard deviations. Where TF32 rounds, it is 0.05. Wider bounds hide wrong tokens.
    latent_bound: float = 2e-4

    # How much more that may be, in bins, from layer to layer: bins get finer by K, and by so much more where constants
    # or the statistics of a step are unlucky.
    bound_growth: float = 4.0

    # The share of a layer's tokens that may have a bound beyond that: steps whose latents are all alike, and actions at
    # the limit, where float32 may overflow.
    unlikely_bounds: float = 0.05

    # The largest share of golden tokens, of all layers, that rounding may excuse. Where one token of twenty flips
    # (near_tie_share), a bound of 8 standard deviations excuses about half; the models here have at most 4 in 100.
    excused_share: float = 0.5


GATES = Gates()


@dataclass(frozen=True)
class Check:
    """One gate on one kind of answer: passes where value <= limit."""

    gate: str
    value: float
    limit: float
    detail: str

    @property
    def passed(self) -> bool:
        return self.value <= self.limit

    def __str__(self) -> str:
        sign, relation = ("✓", "≤") if self.passed else ("✗", ">")
        detail = f" ({self.detail})" if self.detail else ""
        return f"{sign} {self.gate}: {self.value:.4g} {relation} {self.limit:.4g}{detail}"


def near_tie_cap(float32_flips: float) -> int:
    """How many near-ties an implementation may flip where torch's float32 flips so many, or expects to."""
    return math.ceil(GATES.near_tie_ratio * float32_flips) + GATES.near_tie_scatter


def highest_limit(gate: str, num_steps: int, num_latents: int, depth: int) -> float | None:
    """The highest limit that a manifest may state for a gate that was run on so many control steps.

    num_latents: those of a step that have tokens of their own, and depth how many each, L; of a chunk code 1 and L.

    gate: as the build and the replay of golden vectors name it. None for a name that is none of a gate.
    """
    limits = {
        "wrong tokens": GATES.wrong_tokens,
        # Beside the share, every layer of one latent in each step: many steps are chosen because they lie on a border,
        # and layers that say the same flip together.
        "near-tie flips": near_tie_cap(num_steps * depth) + GATES.near_tie_share * num_steps * depth * num_latents,
        "stats error": GATES.stats_error,
        "action error": GATES.action_error,
        "std error": GATES.std_error,
        "mode probability error": GATES.mode_probability_error,
        "certain ones that differ": GATES.certain_differences,
        ACCEPTED: GATES.illegal_values,
        NOT_MARKED: GATES.illegal_values,
    }
    if re.search(r": max \|action error\| of \d+ steps with a near-tie flip$", gate):
        return GATES.flip_error
    found = re.search(r": (?:max \|)?([^:|]+)\|?$", gate)
    return limits.get(found[1]) if found else None


def highest_bounds(num_levels: int, num_layers: int) -> list[float]:
    """For each layer, in its bins: what golden vectors may state as the bound of all but `unlikely_bounds` tokens."""
    first, growth = GATES.latent_bound * (num_levels - 1) / 2, GATES.bound_growth * num_levels
    return list(itertools.accumulate([first, *[growth] * (num_layers - 1)], operator.mul))


def promised_refusal(backend: str, chunk_length: int) -> str:
    """The gate that judges what this backend promises of illegal values; empty for one that promises nothing."""
    spec = BACKENDS.get(backend)
    if spec is None:
        return ""
    if spec.is_on_gpu:
        return NOT_MARKED
    # Longer calls are left to the validator: of longer chunks, all.
    return ACCEPTED if chunk_length <= spec.checked_steps else ""


def missing_gates(
    found: Iterable[str], decoders: Sequence[str], *, has_stats: bool, refusal: str = "", has_beliefs: bool = False
) -> list[str]:
    """Which of the gates that every engine has to pass are not among these.

    decoders: what is decoded, `ModelEntry.decoders`; refusal: see `promised_refusal`; has_beliefs: whether it decodes
    probabilities.
    """
    needed = ["encode: wrong tokens", "encode: near-tie flips"]
    needed += ["encode: stats error"] if has_stats else []
    needed += [f"decode {decoder}: action error" for decoder in decoders]
    if refusal:
        needed += [f"encode: {refusal}", *(f"decode {decoder}: {refusal}" for decoder in decoders)]
    if has_beliefs:
        needed += [f"beliefs: {gate}" for gate in BELIEF_GATES]
    # The replay says in between in which batches, and of which variant.
    bare = {re.sub(r"^golden vectors, |, batch [^:]*|max \||\|$", "", gate) for gate in found}
    return [gate for gate in needed if gate not in bare]
