"""The readout of `calibrated` tokens: the decoder's last linear layer, refitted to the latents it will really get.

In training the decoder sees latents behind the quantiser of the training forward pass, and learns to undo what that
quantiser does to them on average. The calibrated conditioning does something else to them, nearly nothing, so the
lesson is in the way: the same decoder, its last layer refitted to latents that are not quantised, has several times
less action error (docs/calibration.md). That costs no bits and no time: the layer keeps its place and size.

Ridge regression towards the trained layer. With hidden activations h = [mish(W1 z + b1), 1] [N, H + 1] of the latents z
and the trained layer's error e [N, A] in normalised units, the change of [W2, b2] is e^T h (h^T h + N ridge I)^-1
(Hoerl and Kennard, Technometrics 12, 1970, with the prior mean moved from zero to the trained layer). The penalty keeps
directions that the calibration actions do not show as they were trained.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calibration.data import reference_actions, reference_latents
from calibration.errors import CalibrationError
from rfsq_ref.autoencoder import Readout
from rfsq_ref.checkpoints import Checkpoint
from rfsq_ref.data import ActionDataset

#: As in calibration.recovered: far above what processors disagree on, far below what the fit leaves.
_READOUT_BITS = 16


@dataclass(frozen=True)
class ReadoutConfig:
    """ridge: penalty on the squared change of the layer, positive.

    The default has the lowest cross-validated error on the embedded calibration episodes over three training seeds. At
    1e-6 and below, a fit to one task alone makes some other tasks several times worse (docs/calibration.md).
    """

    ridge: float = 1e-4

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ridge) and self.ridge > 0):
            raise CalibrationError(f"readout ridge is {self.ridge}; expected a small positive number, like 1e-4")


DEFAULT_READOUT = ReadoutConfig()


def fit_readout(checkpoint: Checkpoint, episodes: ActionDataset, config: ReadoutConfig = ReadoutConfig()) -> Readout:
    """Fit to the float64 reference's unquantised latents of these episodes; one readout serves every prefix.

    Raises DataError for another action dimension or latents that are not finite.
    """
    actions = reference_actions(checkpoint, episodes)
    model = checkpoint.model(dtype=torch.float64)
    hidden, last = model.decoder[:2], model.decoder[2]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        activations = hidden(reference_latents(model, actions))
        error = (actions - model.offset) / model.units - last(activations)
        features = torch.cat((activations, torch.ones_like(activations[:, :1])), dim=1)
        normal = features.T @ features / len(features)
        normal.diagonal().add_(config.ridge)
        change = torch.cholesky_solve(features.T @ error / len(features), torch.linalg.cholesky(normal)).T
        change = _rounded(change)
        weight, bias = last.weight + change[:, :-1], last.bias + change[:, -1]
    return Readout(weight.float().contiguous(), bias.float().contiguous())


def _rounded(change: Tensor) -> Tensor:
    """To multiples of a power of two about 2^-_READOUT_BITS of the largest entry."""
    largest = change.abs().max()
    if not largest:
        return change
    quantum = torch.exp2(torch.frexp(largest).exponent.double() - _READOUT_BITS)
    return torch.round(change / quantum) * quantum
