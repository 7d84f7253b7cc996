"""Small models and other material that several test modules build on."""

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from rfsq.rfsq_ref.autoencoder import ActionAutoencoder, ModelConfig
from rfsq.rfsq_ref.normaliser import Normaliser
from rfsq.rfsq_ref.quantizer import Conditioning, ConditioningConstants
from rfsq.rfsq_ref.settings import NormaliserKind

CONDITIONINGS = list(Conditioning)
DEFAULT = ModelConfig()


def random_actions(count: int, action_dim: int = 7, seed: int = 0, size: float = 1.0) -> Tensor:
    """float32 [count, A], uniform in [-size, size]."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, action_dim, generator=generator) * 2 - 1) * size


def shrinking_constants(num_layers: int, latent_dim: int, num_levels: int, seed: int = 0) -> ConditioningConstants:
    """Constants like fitted ones: every layer covers a little more than a bin of the one before."""
    generator = torch.Generator().manual_seed(seed)
    ranges = 1.1 * (1.3 / (num_levels - 1)) ** torch.arange(num_layers)
    uneven = 1 + 0.2 * torch.rand(num_layers, latent_dim, generator=generator)
    mean = 0.2 * (torch.rand(num_layers, latent_dim, generator=generator) - 0.5)
    return ConditioningConstants(mean * ranges[:, None], uneven * ranges[:, None])


def some_normaliser(action_dim: int, seed: int = 0) -> Normaliser:
    generator = np.random.default_rng(seed)
    numbers = generator.uniform((-5.0, 0.02), (5.0, 3.0), (action_dim, 2)).astype(np.float32).tolist()
    return Normaliser(NormaliserKind.MIN_MAX, tuple(pair[0] for pair in numbers), tuple(pair[1] for pair in numbers))


def make_model(
    config: ModelConfig = DEFAULT,
    conditioning: Conditioning = Conditioning.NONE,
    *,
    seed: int = 0,
    gain: float = 1.0,
    normaliser: Normaliser | None = None,
    dtype: torch.dtype = torch.float32,
) -> ActionAutoencoder:
    """Random float32 weights, in `dtype`; `gain` makes the encoder's larger, so that its latents spread."""
    torch.manual_seed(seed)
    constants = None
    if conditioning is Conditioning.CALIBRATED:
        constants = shrinking_constants(config.num_layers, config.latent_dim, config.num_levels, seed)
    model = ActionAutoencoder(config, conditioning, constants=constants, normaliser=normaliser)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter *= gain
    return model.to(dtype).eval().requires_grad_(False)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Sizes from the smallest that make sense (two latents, so that `dynamic` has a deviation) to the default's."""
    return ModelConfig(
        action_dim=draw(st.integers(1, 9)),
        latent_dim=draw(st.integers(2, 20)),
        hidden_width=draw(st.sampled_from([1, 2, 16, 64, 100])),
        num_layers=draw(st.integers(1, 9)),
        num_levels=draw(st.integers(2, 11)),
    )
