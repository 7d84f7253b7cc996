"""Answers of the float64 reference to chunks of actions, with all that judging another implementation needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from export.plan import DeployMode
from rfsq_ref.checkpoints import Checkpoint
from rfsq_ref.quantizer import Conditioning
from rfsq_ref.rounding import token_error_bounds
from runtime.comparison import TokenComparison, compare_tokens
from runtime.gates import GATES
from runtime.golden import Float32Array, Float64Array, Golden, Int32Array


@dataclass(frozen=True, eq=False)
class Answers:
    """golden: the float64 model's; float32: how the tokens of torch float32 differ from them."""

    golden: Golden
    float32: TokenComparison


class Reference:
    """The models of one checkpoint in one mode: float64, which decides, and float32, for what rounding alone does."""

    def __init__(self, checkpoint: Checkpoint, mode: DeployMode, prefixes: Sequence[int]) -> None:
        self.mode = mode
        self.prefixes = tuple(prefixes)
        self.model = checkpoint.model(mode.conditioning, dtype=torch.float64)
        self._float32_model = checkpoint.model(mode.conditioning)

    @torch.no_grad()
    def answer(self, actions: Float32Array) -> Answers:
        """actions: float32 [N, T, A] in physical units."""
        inputs = torch.from_numpy(actions)
        tokens, margins, bounds = token_error_bounds(self.model, inputs.double())
        latents = self.model.encode_latents(inputs.double())
        stats = self.model.quantizer.quantize(latents).stats if self.mode.has_stats else None
        # Rounded as they travel: what is decoded from them is decoded from these numbers.
        rounded = None if stats is None else stats.float().numpy()
        expected = tokens.numpy().astype(np.int32)
        decoded = {
            prefix: self.decode(expected[..., :prefix], None if rounded is None else rounded[..., :prefix, :])
            for prefix in self.prefixes
        }
        unquantised = self.model.decode_latents(latents).numpy()
        coding_error = np.abs(decoded[self.prefixes[-1]] - unquantised) / self.model.units.numpy()
        float32 = compare_tokens(
            expected,
            self._float32_model.encode(inputs)[0].numpy(),
            margins.numpy(),
            bounds.numpy(),
            is_step_coupled=self.mode.conditioning is Conditioning.DYNAMIC,
        )
        golden = Golden(
            actions=actions,
            tokens=expected,
            margins=margins.float().numpy(),
            bounds=bounds.float().numpy(),
            stats=rounded,
            decoded=decoded,
            near_tie_cap=int(GATES.near_tie_ratio * float32.num_near_ties),
            # Both sides of a tie code the same latents: each may be as far from them as codings of these actions are.
            flip_tolerance=2 * float(coding_error.max(initial=0)) + GATES.action_error,
        )
        return Answers(golden, float32)

    @torch.no_grad()
    def decode(self, tokens: Tensor | Int32Array, stats: Tensor | Float32Array | None) -> Float64Array:
        """tokens [..., D, l] and, where the mode has them, stats [..., l, 2] to actions float64 [..., A]."""
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

        latents = self.model.encode_latents(torch.from_numpy(actions).double())
        quantised = self.model.quantizer.quantize(latents)
        errors = {"autoencoder without quantiser": mse(self.model.decode_latents(latents).numpy())}
        for prefix in self.prefixes:
            stats = quantised.stats[..., :prefix, :] if self.mode.has_stats and quantised.stats is not None else None
            errors[f"tokens of {prefix} layers"] = mse(self.decode(quantised.tokens[..., :prefix], stats))
        return errors
