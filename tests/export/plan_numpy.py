"""A second opinion on plans: their docstrings, evaluated in numpy, in any precision; and random models to plan."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st

from rfsq.export.plan import Affine, AffineQuantizer, DecoderPlan, DeployMode, EncoderPlan
from rfsq.rfsq_ref.autoencoder import ModelConfig
from rfsq.rfsq_ref.quantizer import SIGMA_EPSILON
from rfsq.rfsq_ref.rounding import token_error_bounds
from rfsq.runtime.bundle.comparison import TokenComparison, compare_tokens
from tests.bundles import Deployed, Recipe

Array = npt.NDArray[Any]
Product = Callable[[Array, Array], Array]


def exact(values: Array, weight: Array) -> Array:
    return values @ weight.T


def mish(values: Array) -> Array:
    return values * np.tanh(np.logaddexp(values.dtype.type(0), values))


def linear(values: Array, layer: Affine, product: Product) -> Array:
    return product(values, layer.weight.astype(values.dtype)) + layer.bias.astype(values.dtype)


def encode(
    plan: EncoderPlan, actions: Array, *, dtype: type = np.float64, product: Product = exact
) -> tuple[Array, Array | None]:
    """actions [..., A] -> tokens int32 [..., D, L] and, where the plan has them, stats [..., L, 2]."""
    hidden = mish(linear(actions.astype(dtype) - plan.offset.astype(dtype), plan.first, product))
    latents = np.tanh(linear(hidden, plan.second, product))
    if isinstance(plan.quantizer, AffineQuantizer):
        return _affine_tokens(plan, plan.quantizer, latents), None
    tokens, stats = [], []
    grid = np.linspace(-1, 1, plan.num_levels).astype(dtype)
    half_range = dtype((plan.num_levels - 1) / 2)
    residual = latents
    for _ in range(plan.num_layers):
        mean = residual.mean(-1, keepdims=True)
        sigma = residual.std(-1, ddof=1, keepdims=True) + dtype(SIGMA_EPSILON)
        bins = ((residual - mean) / sigma + dtype(1)) * half_range - dtype(0.5)
        tokens.append(np.clip(np.ceil(bins), 0, plan.num_levels - 1).astype(np.int32))
        stats.append(np.concatenate((mean, sigma), -1))
        residual = residual - (grid[tokens[-1]] * sigma + mean)
    return np.stack(tokens, -1), np.stack(stats, -2) if plan.has_stats else None


def _affine_tokens(plan: EncoderPlan, quantizer: AffineQuantizer, latents: Array) -> Array:
    middle = (plan.num_levels - 1) // 2
    ratio, shift = quantizer.ratio.astype(latents.dtype), quantizer.shift.astype(latents.dtype)
    tokens = []
    rest = latents
    for layer in range(plan.num_layers):
        bins = rest * ratio[layer] + shift[layer]
        count = np.clip(np.ceil(bins), -middle, plan.num_levels - 1 - middle)
        tokens.append((count + middle).astype(np.int32))
        rest = bins - count
    return np.stack(tokens, -1)


def decode(
    plan: DecoderPlan, tokens: Array, stats: Array | None, *, dtype: type = np.float64, product: Product = exact
) -> Array:
    """tokens [..., D, l] (and stats [..., l, 2]) -> actions [..., A]."""
    if plan.has_stats:
        assert stats is not None
        grid = np.linspace(-1, 1, plan.num_levels).astype(dtype)
        mean, sigma = stats[..., None, :, 0].astype(dtype), stats[..., None, :, 1].astype(dtype)
        inputs = (grid[tokens] * sigma + mean).sum(-1)
    else:
        inputs = tokens.reshape(*tokens.shape[:-2], -1).astype(dtype)
    return linear(mish(linear(inputs, plan.first, product)), plan.second, product) + plan.offset.astype(dtype)


class PlanBackend:
    """A backend that runs plans in numpy's float32: code that shares nothing with ONNX Runtime."""

    name = "numpy"
    description = "plans in numpy float32"
    device = "numpy"
    checked_steps = 0

    def __init__(self, encoder: EncoderPlan, decoders: dict[int, DecoderPlan], product: Product = exact) -> None:
        self._encoder, self._decoders, self._product = encoder, decoders, product

    def encode_into(self, actions: Array, tokens: Array, stats: Array | None) -> None:
        tokens[...], found = encode(self._encoder, actions, dtype=np.float32, product=self._product)
        if stats is not None:
            stats[...] = found

    def decode_into(self, tokens: Array, stats: Array | None, actions: Array) -> None:
        plan = self._decoders[tokens.shape[-1]]
        actions[...] = decode(plan, tokens, stats, dtype=np.float32, product=self._product)

    def close(self) -> None:
        pass


MODES = list(DeployMode)
#: One mode for every code that is generated: `none` has the code of `calibrated` with other numbers, which
#: test_c_source.py and test_cuda_source.py see to.
CODES = [mode for mode in MODES if mode is not DeployMode.NONE]


def without_numbers(source: str) -> str:
    """Generated code without its fingerprint, what its tables hold, and every other number of float32."""
    code = re.sub(r"\b[0-9a-f]{64}\b", "", source)
    code = re.sub(r"(?<= = \{\n).*?(?=\n\};)", "", code, flags=re.DOTALL)
    return re.sub(r"-?0x[0-9a-f.]+p[-+]?\d+f", "", code)


@st.composite
def recipes(draw: st.DrawFn, modes: list[DeployMode] = MODES) -> Recipe:
    """Random models of any size and mode; few enough layers that the last bins stay above float32's rounding."""
    config = ModelConfig(
        action_dim=draw(st.integers(1, 8)),
        latent_dim=draw(st.integers(2, 12)),
        hidden_width=draw(st.sampled_from([1, 3, 16, 64])),
        num_layers=draw(st.integers(1, 5)),
        num_levels=draw(st.integers(2, 9)),
    )
    return Recipe(
        mode=draw(st.sampled_from(modes)),
        config=config,
        chunk_length=draw(st.integers(1, 4)),
        prefixes=tuple(draw(st.sets(st.integers(1, config.num_layers)))),
        has_normaliser=draw(st.booleans()),
        has_engine=False,
        seed=draw(st.integers(0, 99)),
    )


def is_step_coupled(mode: DeployMode) -> bool:
    """Whether one flip moves the later layers of all latents of its step: where these are normalised together."""
    return mode in (DeployMode.DYNAMIC, DeployMode.RECOVERED)


def check_tokens(deployed: Deployed, actions: np.ndarray, found: np.ndarray) -> TokenComparison:
    """No token of actions [N, T, A] is wrong, and few are near-ties, or the bounds would excuse everything."""
    recipe = deployed.recipe
    tokens, margins, bounds = token_error_bounds(deployed.reference, torch.from_numpy(actions).double())
    compared = compare_tokens(
        tokens.numpy(),
        found,
        margins.numpy(),
        bounds.numpy(),
        num_levels=recipe.config.num_levels,
        is_step_coupled=is_step_coupled(recipe.mode),
    )
    assert compared.num_wrong == 0, compared.first_wrong
    assert compared.num_near_ties <= 2 + found.size / 200
    return compared
