"""Nothing that is fitted may be worse than not fitting it, on episodes it was not fitted to: small fits, unlike data.

With a table: `pytest tests/calibration/test_small_fits.py -s`.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rfsq.calibration.constants import constants_of_latents, fit_constants
from rfsq.calibration.data import reference_actions
from rfsq.calibration.readout import ReadoutFit, fit_readout
from rfsq.calibration.recovered import default_prefixes
from rfsq.calibration.settings import CalibrationConfig
from rfsq.rfsq_ref.autoencoder import ActionAutoencoder, RecoveredDecoder
from rfsq.rfsq_ref.checkpoints import Checkpoint
from rfsq.rfsq_ref.quantizer import Conditioning
from tests.calibration.small_fits import SmallFit, fit_recovered, small_fit

#: As many as were judged: a fault in the choice shows in a few of them alone.
ALL = range(30)
#: Those that are trained in no time, of five kinds of data.
FEW = (2, 3, 10, 17, 20)
#: How much worse a fit may be on held-out episodes than none.
WORST = 1.02


def errors(model: ActionAutoencoder, actions: Tensor, prefix: int | None) -> tuple[float, float]:
    """Action MSE in normalised and in robot units², of the first layers or without a quantiser."""
    with torch.no_grad():
        latents = model.encode_latents(actions)
        if prefix is not None:
            latents = model.dequantize(model.encode(actions)[0][..., :prefix])
        error = model.decode_latents(latents) - actions
    return float((error / model.units).square().mean()), float(error.square().mean())


def ratios(
    fitted: ActionAutoencoder, plain: ActionAutoencoder, actions: Tensor, prefixes: tuple[int | None, ...]
) -> Iterator[float]:
    for prefix in prefixes:
        for one, other in zip(errors(fitted, actions, prefix), errors(plain, actions, prefix), strict=True):
            yield one / other


def held_out(fit: SmallFit) -> Tensor:
    return torch.from_numpy(fit.held_out.steps()).double()


def readout_ratio(fit: SmallFit) -> tuple[float, ReadoutFit]:
    """The default over the decoder as trained: the worst of all prefixes, and of normalised and robot units."""
    checkpoint = fit.checkpoint
    checkpoint = checkpoint.with_fit(constants=fit_constants(checkpoint, fit.calibration))
    found = fit_readout(checkpoint, fit.calibration)
    with_readout, without = (
        replace(checkpoint, readout=readout).model(Conditioning.CALIBRATED, dtype=torch.float64)
        for readout in (found.readout, None)
    )
    prefixes = (None, *default_prefixes(checkpoint.config.num_layers))
    return max(ratios(with_readout, without, held_out(fit), prefixes)), found


def test_the_default_readout_is_worse_in_none_and_better_in_most() -> None:
    found = []
    print(f"\n{'':>4} {'data':20} {'A':>3} {'T':>3} {'episodes':>8} {'epochs':>6}  {'ridge':>6}  MSE over as trained")
    for seed in ALL:
        fit = small_fit(seed)
        ratio, readout = readout_ratio(fit)
        found.append(ratio)
        print(
            f"{seed:>4} {fit.kind:20} {fit.held_out.action_dim:>3} {fit.chunk_length:>3} "
            f"{len(fit.calibration.episodes):>8} {fit.config.epochs:>6}  "
            f"{'-' if readout.readout is None else f'{readout.ridge:g}':>6}  {ratio:.3f}"
        )
    assert max(found) <= WORST
    assert sum(ratio < 0.95 for ratio in found) > len(ALL) / 2


def plain_constants(checkpoint: Checkpoint) -> Checkpoint:
    """What needs no data: every layer covers all that the one before can leave of [-1, 1]."""
    sizes = checkpoint.config
    ends = torch.tensor([[-1.0], [1.0]], dtype=torch.float64).expand(2, sizes.latent_dim)
    whole = CalibrationConfig(headroom=0.0)
    return checkpoint.with_fit(constants=constants_of_latents(ends, sizes.num_layers, sizes.num_levels, whole))


@pytest.mark.parametrize("seed", FEW)
def test_fitted_constants_are_not_worse_than_constants_that_need_no_data(seed: int) -> None:
    fit = small_fit(seed)
    checkpoint = fit.checkpoint
    fitted = checkpoint.with_fit(constants=fit_constants(checkpoint, fit.calibration))
    models = [one.model(Conditioning.CALIBRATED, dtype=torch.float64) for one in (fitted, plain_constants(checkpoint))]
    prefixes = tuple(range(1, checkpoint.config.num_layers + 1))
    assert max(ratios(models[0], models[1], held_out(fit), prefixes)) <= WORST


@torch.no_grad()
def mean_map(checkpoint: Checkpoint, fit: SmallFit, prefix: int) -> RecoveredDecoder:
    """Mean and sigma of every layer at their means over the calibration steps."""
    model = checkpoint.model(dtype=torch.float64)
    _, stats = model.encode(reference_actions(checkpoint, fit.calibration))
    assert stats is not None
    mean, sigma = stats.mean(dim=0)[:prefix].T
    sizes = checkpoint.config
    per_latent = torch.einsum("de,l->del", torch.eye(sizes.latent_dim).double(), 2 * sigma / (sizes.num_levels - 1))
    return RecoveredDecoder(per_latent.flatten(1), (mean - sigma).sum().expand(sizes.latent_dim))


@pytest.mark.parametrize("seed", [2, 3, 10, 23])
def test_recovered_decoders_are_not_worse_than_mean_side_information(seed: int) -> None:
    fit = small_fit(seed)
    checkpoint = fit.checkpoint
    prefixes = default_prefixes(checkpoint.config.num_layers)
    fitted = checkpoint.with_fit(recovered=fit_recovered(checkpoint, fit.calibration, prefixes))
    plain = checkpoint.with_fit(recovered={prefix: mean_map(checkpoint, fit, prefix) for prefix in prefixes})
    models = [one.model(dtype=torch.float64) for one in (fitted, plain)]
    assert max(ratios(models[0], models[1], held_out(fit), prefixes)) <= WORST
