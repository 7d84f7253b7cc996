"""What engines are judged on, and the answers of the float64 reference to it.

The actions are held-out episodes, their surroundings, random ones, and edges of ranges and of bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rfsq.export.golden_inputs import Span, bins_of, bisected, sensitive_steps, to_edge
from rfsq.export.plan import DeployMode
from rfsq.rfsq_ref.autoencoder import ActionAutoencoder
from rfsq.rfsq_ref.checkpoints import Checkpoint
from rfsq.rfsq_ref.rounding import token_error_bounds
from rfsq.runtime.bundle.arrays import Float32Array, Float64Array, Int32Array, in_chunks
from rfsq.runtime.bundle.comparison import TokenComparison, compare_tokens
from rfsq.runtime.bundle.fidelity import Fidelity, fidelity
from rfsq.runtime.bundle.gates import GATES, near_tie_cap
from rfsq.runtime.bundle.golden import Expected, Golden

EDGES = "edges"
#: More corners than this are sampled, not listed.
_MOST_CORNERS = 256
_NEAR_TIES = 512
#: Standard deviation of the steps around episodes, as a share of the range.
_SPREAD = 0.05
#: Neighbours of a step that are tried, by so many float32 numbers away in each dimension.
_NEIGHBOURS, _REACH = 4096, 3
#: Float32's errors have about a fortieth of their bound as standard deviation: as far from an edge as this share of it,
#: one step in six flips, and more do where errors are larger.
_SHARE_OF_BOUND = 1 / 16
#: What an action error is of, without a quantiser.
AS_TRAINED, REFITTED = "autoencoder as trained, no quantiser", "readout refitted, no quantiser"
#: Hundreds of flips of torch float32 stand behind the largest one's error; another implementation flips others.
_FLIP_ROOM = 10.0
#: So much better than the gate torch float32 has to be: another implementation rounds otherwise.
_ROUND_TRIP_ROOM = 4


@dataclass(frozen=True, eq=False)
class Answers:
    """expected: the float64 model's; float32: how the tokens of torch float32 differ from them.

    round_trip: float64 [N, T], how far the tokens and statistics of torch float32 decode from the reference's, in
    normalised units; without statistics that is 0 wherever the tokens are the same.
    """

    expected: Expected
    float32: TokenComparison
    round_trip: Float64Array

    @property
    def has_float32_stats(self) -> npt.NDArray[np.bool_]:
        """[N, T]: of which steps float32 can give the statistics of a `dynamic` model.

        Far beyond the range sums cancel, and their rounding grows from layer to layer: what that decodes to tells
        nothing of an engine. A flip has a limit of its own.
        """
        error = np.where(self.float32.flipped, 0, self.round_trip)
        return np.asarray(error <= GATES.action_error / _ROUND_TRIP_ROOM)


class Reference:
    """The models of one checkpoint in one mode: float64, which decides, and float32, for what rounding alone does."""

    def __init__(self, checkpoint: Checkpoint, mode: DeployMode, prefixes: Sequence[int]) -> None:
        self.mode = mode
        self.prefixes = tuple(prefixes)
        self.model = checkpoint.model(mode.conditioning, dtype=torch.float64)
        self._float32_model = checkpoint.model(mode.conditioning)
        self._is_refitted = checkpoint.readout is not None and mode is DeployMode.CALIBRATED
        self._trained_decoder = checkpoint.model(dtype=torch.float64).decode_latents

    @torch.no_grad()
    def answer(self, actions: Float32Array) -> Answers:
        """actions: float32 [N, T, A] in physical units."""
        inputs = torch.from_numpy(actions)
        latents = self.model.encode_latents(inputs.double())
        quantized = self.model.quantizer.quantize(latents)
        # Rounded as they travel: what is decoded from them is decoded from these numbers.
        stats = quantized.stats.float().numpy() if quantized.stats is not None and self.mode.has_stats else None
        tokens = quantized.tokens.numpy().astype(np.int32)
        decoded = {prefix: self.decode(tokens[..., :prefix], stats) for prefix in self.prefixes}
        float32_tokens, float32_stats = self._encode(self._float32_model, inputs)
        float32 = self.judge(actions, tokens, float32_tokens.numpy())
        of_float32 = self.decode(float32_tokens, float32_stats)
        round_trip = (np.abs(decoded[self.prefixes[-1]] - of_float32) / self.model.units.numpy()).max(-1)
        expected = Expected(
            actions=actions,
            tokens=tokens,
            stats=stats,
            decoded=decoded,
            near_tie_cap=near_tie_cap(float32.num_near_ties),
            flip_tolerance=self._flip_tolerance(latents, decoded[self.prefixes[-1]], round_trip),
        )
        return Answers(expected, float32, round_trip)

    def golden(self, expected: Expected) -> Golden:
        """The same, with the margin and the bound of every token."""
        actions, tokens = torch.from_numpy(expected.actions).double(), torch.from_numpy(expected.tokens).long()
        _, *edges = token_error_bounds(self.model, actions, tokens)
        margins, bounds = (part.float().numpy() for part in edges)
        return Golden(**vars(expected), margins=margins, bounds=bounds)

    def _flip_tolerance(self, latents: Tensor, decoded: Float64Array, round_trip: Float64Array) -> float:
        """How far a step with a near-tie flip may lie from `decoded`, in normalised units.

        Both sides of a tie code the same latents, so each may be as far from them as codings of these actions are.
        Where those are poor, as with a recovered decoder, torch float32's own flips are the better measure.
        """
        unquantised = self.model.decode_latents(latents).numpy()
        coding_error = float((np.abs(decoded - unquantised) / self.model.units.numpy()).max(initial=0))
        return min(2 * coding_error, _FLIP_ROOM * float(round_trip.max(initial=0))) + GATES.action_error

    def judge(
        self, actions: Float32Array, expected: Int32Array, found: npt.NDArray[np.integer[Any]]
    ) -> TokenComparison:
        """Every token that float32 cannot explain, however many differ before it.

        actions: float32 [N, T, A]; expected: the reference's own tokens, found: another implementation's, both
        [N, T, D, L]. Where a step differs, the reference decides again along the found tokens, layer by layer: what
        it is not allowed to differ in then, a near-tie in an earlier layer does not excuse.
        """
        num_levels = self.model.config.num_levels
        decisions, margins, bounds = expected.astype(np.int64), np.ones(found.shape), np.zeros(found.shape)
        differs = (expected != found).any(axis=(-2, -1))
        if differs.any():
            # What is no level at all is wrong as it stands; any level will do to go on from there.
            followed = torch.from_numpy(np.clip(found[differs], 0, num_levels - 1).astype(np.int64))
            answers = token_error_bounds(self.model, torch.from_numpy(actions[differs]).double(), followed)
            decisions[differs], margins[differs], bounds[differs] = (answer.numpy() for answer in answers)
        return compare_tokens(decisions, found, margins, bounds, num_levels=num_levels, is_step_coupled=None)

    def _encode(self, model: ActionAutoencoder, actions: Tensor) -> tuple[Tensor, Tensor | None]:
        """tokens [..., D, L] and, where the mode has them, stats [..., L, 2] of actions [..., A]."""
        tokens, stats = model.encode(actions)
        return tokens, stats if self.mode.has_stats else None

    @torch.no_grad()
    def decode(self, tokens: Tensor | Int32Array, stats: Tensor | Float32Array | None) -> Float64Array:
        """tokens [..., D, l] to actions float64 [..., A]; stats: where the mode has them, of l layers or more."""
        side_information = None if stats is None else torch.as_tensor(stats).double()
        decoded: Float64Array = self.model.decode(torch.as_tensor(tokens).long(), side_information).numpy()
        return decoded

    @torch.no_grad()
    def action_mse(self, actions: Float32Array) -> dict[str, float]:
        """Mean squared error in normalised units of steps [N, A], by what they are decoded from; empty without any."""
        if not len(actions):
            return {}
        units = self.model.units.numpy()

        def mse(decoded: Float64Array) -> float:
            return float(np.mean(((decoded - actions) / units) ** 2))

        inputs = torch.from_numpy(actions).double()
        latents = self.model.encode_latents(inputs)
        tokens, stats = self._encode(self.model, inputs)
        errors = {AS_TRAINED: mse(self._trained_decoder(latents).numpy())}
        if self._is_refitted:
            errors[REFITTED] = mse(self.model.decode_latents(latents).numpy())
        for prefix in self.prefixes:
            errors[f"tokens of {prefix} layers"] = mse(self.decode(tokens[..., :prefix], stats))
        return errors

    @torch.no_grad()
    def fidelity(self, actions: Float32Array) -> Fidelity | None:
        """What all layers make of steps [N, A], for each dimension in the robot's units; None without any."""
        if not len(actions):
            return None
        decoded = self.decode(*self._encode(self.model, torch.from_numpy(actions).double()))
        return fidelity(actions, decoded, self.model.units.tolist(), self.model.offset.tolist())


@dataclass(frozen=True)
class Section:
    """actions: float32 [N, T, A] in physical units."""

    name: str
    actions: Float32Array

    @property
    def num_steps(self) -> int:
        return int(np.prod(self.actions.shape[:2]))


# Which steps are judged follows from seven facts, most of them given by name.
def parity_sections(  # noqa: PLR0913
    model: ActionAutoencoder,
    episodes: Float32Array,
    *,
    chunk_length: int,
    limit: float,
    num_steps: int,
    prefixes: Sequence[int] = (),
    seed: int = 0,
) -> tuple[Section, ...]:
    """Sections of at least `num_steps` control steps together.

    model: the float64 reference; episodes: steps [N, A] it was not fitted to; limit: the largest |action| allowed;
    prefixes: of the decoders whose constants the edges shall show too.
    """
    random = np.random.default_rng(seed)
    span = _span(model, episodes, limit)
    near = max(num_steps - len(episodes), 0) // 2 if len(episodes) else 0
    centres = episodes[random.integers(max(len(episodes), 1), size=near)]
    around = centres + _SPREAD * (span.high - span.low) * random.standard_normal(centres.shape)
    uniform = random.uniform(span.low, span.high, (max(num_steps - len(episodes) - near, chunk_length), len(span.low)))
    edges = edge_steps(model, span, random)
    sensitive = sensitive_steps(model, prefixes, span, num_steps, random)
    steps: dict[str, npt.NDArray[np.floating]] = {
        "episodes": episodes,
        "around them": around,
        "uniform random": uniform,
        EDGES: np.concatenate((edges, sensitive)),
    }
    return tuple(Section(name, in_chunks(part.astype(np.float32), chunk_length)) for name, part in steps.items())


def edge_steps(model: ActionAutoencoder, span: Span, random: np.random.Generator) -> Float32Array:
    """Steps [N, A]: zeros, the corners of the range, subnormal and huge values, and actions closest to a bin's edge."""
    low, high, limit, action_dim = span.low, span.high, span.limit, len(span.low)
    corners = random.choice([-1.0, 1.0], (_MOST_CORNERS, action_dim))
    if 2**action_dim <= _MOST_CORNERS:
        corners = np.array(np.meshgrid(*[[-1.0, 1.0]] * action_dim)).reshape(action_dim, -1).T
    signs = random.choice([-1.0, 1.0], (16, action_dim))
    tiny, least = np.finfo(np.float32).tiny, np.finfo(np.float32).smallest_subnormal
    huge = [signs[:4] * min(size, limit) for size in (1e3, 1e6, 1e12, limit)]
    lone = np.concatenate([np.eye(action_dim) * size for size in (-limit, -min(1e4, limit), min(1e4, limit), limit)])
    return np.concatenate(
        [
            np.zeros((1, action_dim)),
            -np.zeros((1, action_dim)),
            (low + high) / 2 + corners * (high - low) / 2,
            corners,
            *(signs * size for size in (least, 7 * least, tiny / 2, tiny)),
            *huge,
            lone,
            near_ties := near_tie_steps(model, span, random),
            neighbours_at_rounding_distance(model, near_ties[::2], random),
        ]
    ).astype(np.float32)


@torch.no_grad()
def near_tie_steps(model: ActionAutoencoder, span: Span, random: np.random.Generator) -> Float32Array:
    """Steps [N, A] as close to an edge between two bins, of any layer, as float32 actions can come.

    Between two random actions with different tokens there is an edge: found by bisection on the float64 reference,
    for each pair on the tokens of the first layers up to one drawn at random.
    """
    pairs = random.uniform(span.low, span.high, (2, _NEAR_TIES, len(span.low)))
    first, second = torch.from_numpy(pairs.astype(np.float32))
    ignored = _ignored_layers(model, _NEAR_TIES, random)

    def tokens(actions: torch.Tensor) -> torch.Tensor:
        return model.encode(actions.double())[0].masked_fill(ignored, 0)

    of_first = tokens(first)
    ties = bisected(first, second, lambda steps: (tokens(steps) == of_first).flatten(1).all(1))
    return torch.cat(ties).numpy()


def _ignored_layers(model: ActionAutoencoder, count: int, random: np.random.Generator) -> torch.Tensor:
    """bool [count, 1, L]: the layers behind one drawn at random; with all, the narrow bins of the last count alone."""
    depth = torch.from_numpy(random.integers(1, model.config.num_layers + 1, count))
    return (torch.arange(model.config.num_layers) >= depth[:, None])[:, None, :]


@torch.no_grad()
def neighbours_at_rounding_distance(
    model: ActionAutoencoder, steps: Float32Array, random: np.random.Generator
) -> Float32Array:
    """For each of the steps [N, A] a float32 action beside it that lies as far from an edge as float32 rounds.

    Where joints rest far from zero, float32 actions lie so far apart that hardly any on a line comes near an edge: a
    count of flips would be one of chance. Among the neighbours in all dimensions there are some. Which they are follows
    from how far each dimension's next number moves the value that is decided on.
    """
    ignored = _ignored_layers(model, len(steps), random)

    def bins(actions: Float32Array) -> torch.Tensor:
        return bins_of(model, model.encode_latents(torch.from_numpy(actions).double()))

    here = bins(steps)
    missing = to_edge(model, here)
    nearest = missing.abs().masked_fill(ignored, torch.inf).flatten(1).argmin(1, keepdim=True)

    def of_nearest(values: torch.Tensor) -> Float64Array:
        found: Float64Array = values.flatten(1).gather(1, nearest).numpy()
        return found

    effects = []
    for dimension in range(steps.shape[1]):
        moved = steps.copy()
        moved[:, dimension] += np.spacing(np.abs(moved[:, dimension]))
        effects.append(of_nearest(bins(moved) - here))
    bounds = token_error_bounds(model, torch.from_numpy(steps).double())[2]
    moves = random.integers(-_REACH, _REACH + 1, (_NEIGHBOURS, steps.shape[1]))
    wanted = of_nearest(bounds) * random.uniform(-_SHARE_OF_BOUND, _SHARE_OF_BOUND, (len(steps), 1))
    missed = np.abs(np.hstack(effects) @ moves.T - of_nearest(missing) - wanted)
    neighbours: Float32Array = (steps + moves[missed.argmin(1)] * np.spacing(np.abs(steps))).astype(np.float32)
    return neighbours


def _span(model: ActionAutoencoder, episodes: Float32Array, limit: float) -> Span:
    """The normalised range [-1, 1], widened to what the episodes hold."""
    offset, units = model.offset.numpy(), model.units.numpy()
    return Span(
        np.minimum(offset - units, episodes.min(axis=0, initial=np.inf)),
        np.maximum(offset + units, episodes.max(axis=0, initial=-np.inf)),
        limit,
    )
