"""The numbers of the error bound: a slip in one term of it moves them, where that the bound holds would not show it.

Each is the geometric mean over steps and latents, in units of float32's roundoff. A bound that was derived anew has new
numbers; the message of the failed test has them.
"""

from dataclasses import dataclass
from math import inf

import pytest
import torch
from torch import Tensor

from rfsq.rfsq_ref.autoencoder import ActionAutoencoder, ModelConfig
from rfsq.rfsq_ref.normaliser import Normaliser
from rfsq.rfsq_ref.quantizer import Conditioning, ConditioningConstants
from rfsq.rfsq_ref.rounding import UNIT, latent_error_bound, token_error_bounds
from rfsq.rfsq_ref.settings import NormaliserKind

SMALL = ModelConfig(action_dim=3, latent_dim=4, hidden_width=5, num_layers=3, num_levels=6)
#: More units and latents than eight deviations cover by themselves.
WIDE = ModelConfig(action_dim=3, latent_dim=70, hidden_width=100, num_layers=1, num_levels=7)
NORMALISER = Normaliser(NormaliserKind.MIN_MAX, (0.0, 0.0, 0.0), (0.25, 3.0, 1.0))


def waves(*shape: int, phase: float = 0.0) -> Tensor:
    """float64 numbers in [-1, 1] that are the same with every version of every library."""
    return torch.sin(
        1.7 * torch.arange(1.0, torch.Size(shape).numel() + 1, dtype=torch.float64) ** 1.3 + phase
    ).reshape(shape)


@dataclass(frozen=True)
class Setting:
    """gain, bias, outer: of the encoder's first weights, of its biases and of its second weights.

    common: what all latents have before tanh; size: of normalised actions; cancelled: so much of them cancels in the
    first sum; follows: other tokens than its own.
    """

    conditioning: Conditioning
    config: ModelConfig = SMALL
    gain: float = 1.0
    bias: float = 0.3
    outer: float = 0.8
    common: float = 0.0
    size: float = 1.0
    cancelled: float = 0.0
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
        if self.cancelled:
            weight = model.encoder[0].weight / model.units
            weight[:, 1] = -weight[:, 0]
            model.encoder[0].weight.copy_(weight * model.units)
        return model

    def actions(self, model: ActionAutoencoder) -> Tensor:
        cancelled = self.cancelled * torch.tensor([1.0, 1.0, 0.0])
        return self.size * waves(6, self.config.action_dim, phase=5) * model.units + cancelled


SETTINGS = {
    "naive": Setting(Conditioning.NONE, normaliser=NORMALISER),
    "calibrated": Setting(Conditioning.CALIBRATED, normaliser=NORMALISER),
    "dynamic": Setting(Conditioning.DYNAMIC, normaliser=NORMALISER),
    "calibrated, along other tokens": Setting(Conditioning.CALIBRATED, follows=True),
    "dynamic, along other tokens": Setting(Conditioning.DYNAMIC, follows=True),
    "wide": Setting(Conditioning.NONE, WIDE),
    "wide and dynamic": Setting(Conditioning.DYNAMIC, WIDE, outer=0.1),
    "nearly saturated": Setting(Conditioning.NONE, gain=30.0, outer=0.1),
    "what is left is small": Setting(Conditioning.NONE, cancelled=1e6),
    "what is left is small, dynamic": Setting(Conditioning.DYNAMIC, cancelled=1.2e5),
    "a deviation that may be half of itself": Setting(Conditioning.DYNAMIC, cancelled=2e5),
    "close to zero, dynamic": Setting(Conditioning.DYNAMIC, bias=0.0, size=1e-6),
    "underflow": Setting(Conditioning.NONE, gain=0.5, bias=0.0, size=1e-42),
    "hardly any spread": Setting(Conditioning.DYNAMIC, bias=0.0, outer=3e-5, common=0.3),
    "a spread of next to nothing": Setting(Conditioning.DYNAMIC, bias=0.0, outer=1e-60),
}
#: Of the latents, then of the tokens of each layer.
NUMBERS: dict[str, list[float]] = {
    "naive": [41.0527552, 120.06235, 116.398035, 117.928587],
    "calibrated": [41.0527552, 128.137438, 532.158847, 2796.31265],
    "dynamic": [41.0527552, 144.812103, 644.839472, 2995.9529],
    "calibrated, along other tokens": [41.0527552, 128.137438, 589.748661, 3175.09151],
    "dynamic, along other tokens": [41.0527552, 144.812103, 131.09158, 124.176246],
    "wide": [78.285883, 274.150844],
    "wide and dynamic": [43.1748237, 369.905557],
    "nearly saturated": [44.6751103, 139.339019, 131.890312, 134.55293],
    "what is left is small": [18451478.3, 46128695.8, 46128695.8, 46128695.8],
    "what is left is small, dynamic": [1072515.34, 4836693.63, inf, inf],
    "a deviation that may be half of itself": [2003299.32, inf, inf, inf],
    "close to zero, dynamic": [5.25121849e-05, 38.3988361, 85.3076433, 125.706422],
    "underflow": [1.64436026e-26, 35.0998575, 45.7820926, 42.142615],
    "hardly any spread": [10.6503487, 667340.139, 1332980.08, 1515659.34],
    "a spread of next to nothing": [1.58294565e-26, 34.6410327, 78.378891, 130.523499],
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


def test_the_latents_are_the_references_own() -> None:
    normaliser = Normaliser(NormaliserKind.MIN_MAX, (0.5, -2.0, 7.0), (0.25, 3.0, 1.0))
    setting = Setting(Conditioning.NONE, normaliser=normaliser)
    model = setting.model()
    actions = setting.actions(model) + model.offset
    torch.testing.assert_close(latent_error_bound(model, actions)[0], model.encode_latents(actions))


def unit_model(first: float, bias: float, second: float, last_bias: float) -> ActionAutoencoder:
    """One action; of two hidden units and two latents, the others are zero."""
    model = ActionAutoencoder(ModelConfig(1, 2, 2, 1, 3), Conditioning.NONE).double()
    model.requires_grad_(False)
    for parameter, value in zip(model.encoder.parameters(), (first, bias, second, last_bias), strict=True):
        parameter.zero_()
        parameter.view(-1)[0] = value
    return model


@pytest.mark.parametrize(
    ("parameters", "action"),
    [
        ((1.0, 0.0, 0.5, 0.0), 2.0**126),
        ((1.0, -(2.0**125), 0.5, 0.0), 2.0**125),
        ((1.0, 0.0, 4.0, 0.0), 2.0**124),
        ((1.0, 0.0, 2.0, -(2.0**125)), 2.0**124),
    ],
)
def test_a_bound_ends_where_a_sum_may_reach_half_of_the_largest_float32(
    parameters: tuple[float, float, float, float], action: float
) -> None:
    model = unit_model(*parameters)
    actions = torch.tensor([[action], [action * (1 - 1e-9)]], dtype=torch.float64)
    assert latent_error_bound(model, actions)[1].isinf().tolist() == [[True, True], [False, False]]
    assert token_error_bounds(model, actions)[2].isinf().flatten(1).tolist() == [[True, True], [False, False]]


def test_blocks_of_steps_change_nothing() -> None:
    setting = Setting(Conditioning.DYNAMIC)
    model = setting.model()
    actions = setting.actions(model).repeat(1000, 1)
    for whole, part in zip(token_error_bounds(model, actions), token_error_bounds(model, actions[:6]), strict=True):
        assert whole.shape == (6000, 4, 3)
        torch.testing.assert_close(whole, part.repeat(1000, 1, 1))
