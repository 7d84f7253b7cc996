"""The numbers of the error bound: a slip in one term of it moves them, where that the bound holds would not show it.

Each is the geometric mean over steps and latents, in units of float32's roundoff. A bound that was derived anew has new
numbers; the message of the failed test has them.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from rfsq_ref.autoencoder import ActionAutoencoder, ModelConfig
from rfsq_ref.normaliser import Normaliser, NormaliserKind
from rfsq_ref.quantizer import Conditioning, ConditioningConstants
from rfsq_ref.rounding import UNIT, latent_error_bound, token_error_bounds

SMALL = ModelConfig(action_dim=3, latent_dim=4, hidden_width=5, num_layers=3, num_levels=6)
#: More units and latents than eight deviations cover by themselves.
WIDE = ModelConfig(action_dim=3, latent_dim=70, hidden_width=100, num_layers=1, num_levels=7)
NORMALISER = Normaliser(NormaliserKind.MIN_MAX, (0.5, -2.0, 0.0), (0.25, 3.0, 1.0))


def waves(*shape: int, phase: float = 0.0) -> Tensor:
    """float64 numbers in [-1, 1] that are the same with every version of every library."""
    return torch.sin(
        1.7 * torch.arange(1.0, torch.Size(shape).numel() + 1, dtype=torch.float64) ** 1.3 + phase
    ).reshape(shape)


@dataclass(frozen=True)
class Setting:
    """gain, bias, outer: of the encoder's first weights, of its biases and of its second weights.

    common: what all latents have before tanh; size: of normalised actions; follows: other tokens than its own.
    """

    conditioning: Conditioning
    config: ModelConfig = SMALL
    gain: float = 1.0
    bias: float = 0.3
    outer: float = 0.8
    common: float = 0.0
    size: float = 1.0
    normaliser: Normaliser | None = None
    follows: bool = False

    def model(self) -> ActionAutoencoder:
        constants, config = None, self.config
        if self.conditioning is Conditioning.CALIBRATED:
            shape = (config.num_layers, config.latent_dim)
            shrink = 5.0 ** -torch.arange(config.num_layers, dtype=torch.float64)[:, None]
            constants = ConditioningConstants(0.2 * shrink * waves(*shape), shrink * (1 + 0.2 * waves(*shape, phase=1)))
        model = ActionAutoencoder(config, self.conditioning, constants=constants, normaliser=self.normaliser).double()
        model.requires_grad_(False)
        sizes = (self.gain, self.bias, self.outer, self.bias)
        for phase, (parameter, size) in enumerate(zip(model.encoder.parameters(), sizes, strict=True)):
            parameter.copy_(size * waves(*parameter.shape, phase=phase))
        parameter += self.common
        return model

    def actions(self, model: ActionAutoencoder) -> Tensor:
        return self.size * waves(6, self.config.action_dim, phase=5) * model.units + model.offset


SETTINGS = {
    "naive": Setting(Conditioning.NONE, normaliser=NORMALISER),
    "calibrated": Setting(Conditioning.CALIBRATED, normaliser=NORMALISER),
    "dynamic": Setting(Conditioning.DYNAMIC, normaliser=NORMALISER),
    "calibrated, along other tokens": Setting(Conditioning.CALIBRATED, follows=True),
    "dynamic, along other tokens": Setting(Conditioning.DYNAMIC, follows=True),
    "wide": Setting(Conditioning.NONE, WIDE),
    "wide and dynamic": Setting(Conditioning.DYNAMIC, WIDE, outer=0.1),
    "nearly saturated": Setting(Conditioning.NONE, gain=30.0, outer=0.1),
    "far from zero": Setting(Conditioning.NONE, normaliser=replace(NORMALISER, offset=(1e6, -1e6, 1e5))),
    "underflow": Setting(Conditioning.NONE, gain=0.5, bias=0.0, size=1e-42),
    "hardly any spread": Setting(Conditioning.DYNAMIC, bias=0.0, outer=3e-5, common=0.3),
}
#: Of the latents, then of the tokens of each layer.
NUMBERS: dict[str, list[float]] = {
    "naive": [49.6723374, 140.063157, 136.517568, 137.819888],
    "calibrated": [49.6723374, 148.531949, 631.773041, 3325.20161],
    "dynamic": [49.6723374, 166.977465, 748.4655, 3519.95978],
    "calibrated, along other tokens": [41.0527552, 128.137438, 589.748661, 3175.09151],
    "dynamic, along other tokens": [41.0527552, 144.812103, 131.09158, 124.176246],
    "wide": [78.285883, 274.150844],
    "wide and dynamic": [43.1748237, 369.905557],
    "nearly saturated": [44.6751103, 139.339019, 131.890312, 134.55293],
    "far from zero": [120526273, 301315682, 301315682, 301315682],
    "underflow": [1.64436026e-26, 35.0998575, 45.7820926, 42.142615],
    "hardly any spread": [10.6503487, 667340.139, 1332980.08, 1515659.34],
}


def numbers(setting: Setting) -> list[float]:
    model = setting.model()
    actions = setting.actions(model)
    other = (model.encode(actions)[0] + 1) % setting.config.num_levels if setting.follows else None
    _, of_latents = latent_error_bound(model, actions)
    _, _, of_tokens = token_error_bounds(model, actions, other)
    return [float((bound / UNIT).log().mean().exp()) for bound in (of_latents, *of_tokens.unbind(-1))]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_bound_has_the_numbers_that_were_derived(name: str) -> None:
    found = numbers(SETTINGS[name])
    assert found == pytest.approx(NUMBERS[name], rel=1e-6, abs=0), f'"{name}": {found},'


@pytest.mark.parametrize(("first", "second", "largest"), [(1.0, 0.5, 2.0**126), (1.0, 4.0, 2.0**124)])
def test_a_bound_ends_where_a_sum_may_reach_half_of_the_largest_float32(
    first: float, second: float, largest: float
) -> None:
    model = ActionAutoencoder(ModelConfig(1, 1, 1, 1, 3), Conditioning.NONE).double()
    model.requires_grad_(False)
    for parameter, value in zip(model.encoder.parameters(), (first, 0.0, second, 0.0), strict=True):
        parameter.fill_(value)
    actions = torch.tensor([[largest], [largest * (1 - 1e-9)]], dtype=torch.float64)
    assert latent_error_bound(model, actions)[1].isinf().flatten().tolist() == [True, False]
    assert token_error_bounds(model, actions)[2].isinf().flatten().tolist() == [True, False]
