"""Round an obstacle on the left or on the right: the mean of both hits it, the likeliest way does not."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rfsq.calibration.chunk import fit_chunk_code
from rfsq.rfsq_ref.beliefs import BitProbabilities, chunk_belief, step_belief
from rfsq.rfsq_ref.checkpoints import Checkpoint
from rfsq.rfsq_ref.chunk_code import ChunkSizes
from rfsq.rfsq_ref.chunk_model import ChunkTokenizer
from rfsq.rfsq_ref.quantizer import Conditioning
from rfsq.runtime.bundle.beliefs import Belief, BeliefMode

#: Steps of a way; half the width of the obstacle, which stands on the straight line; how likely the left is.
LENGTH, HALF_WIDTH, SHARE = 8, 0.25, 0.55

Decode = Callable[[BeliefMode], Belief[Tensor]]


def way(side: float, size: int) -> np.ndarray:
    """Ahead, and aside by an arc: actions [LENGTH, size], the second of which goes sideways."""
    found = np.zeros((LENGTH, size), np.float32)
    found[:, 0], found[:, 1] = 0.4, side * 0.6 * np.sin(np.linspace(0.3, np.pi - 0.3, LENGTH))
    return found


def both_ways(size: int) -> Tensor:
    """[2, LENGTH, size], the left one first."""
    return torch.from_numpy(np.stack([way(side, size) for side in (-1, 1)])).double()


@pytest.fixture(scope="module")
def by_class() -> Decode:
    """Chunk tokens: a class for either way, and the bits of each given its class."""
    random = np.random.default_rng(0)
    episodes = [
        np.tile(way(side, 2), (4, 1)) + 0.02 * random.standard_normal((4 * LENGTH, 2)) for side in [-1.0, 1.0] * 12
    ]
    sizes = ChunkSizes(2, LENGTH, num_classes=8, token_bits=8, num_tokens=8)
    model = ChunkTokenizer(sizes, fit_chunk_code(episodes[4:], episodes[:4], sizes)).double()
    bits = model.code.bits(model.encode(both_ways(2)))
    left, right = model.code.classes(bits).tolist()
    assert left != right
    classes, of_class = torch.zeros(1, 8).double(), torch.full((1, 8, sizes.code_bits), 0.5).double()
    for index, share, code in zip((left, right), (SHARE, 1 - SHARE), bits[:, sizes.class_bits :], strict=True):
        classes[0, index], of_class[0, index] = share, code.double()
    return lambda mode: chunk_belief(model, BitProbabilities(classes, of_class), mode, torch.Generator().manual_seed(0))


@pytest.fixture
def by_layer(calibrated: Checkpoint) -> Decode:
    """Per-step tokens: every token is that of the one way or that of the other."""
    model = calibrated.model(Conditioning.CALIBRATED, dtype=torch.float64)
    left, right = functional.one_hot(model.encode(both_ways(7))[0], calibrated.config.num_levels).double()
    mixed = (SHARE * left + (1 - SHARE) * right).unsqueeze(0)
    return lambda mode: step_belief(model, mixed, mode, 3, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["by_class", "by_layer"])
def test_the_mean_hits_the_obstacle_the_likeliest_mode_goes_round_it_and_its_probability_tells(
    kind: str, request: pytest.FixtureRequest
) -> None:
    decode: Decode = request.getfixturevalue(kind)
    found = {mode: decode(mode) for mode in ("expected", "likeliest mode")}
    aside = {mode: belief.actions[0, LENGTH // 2, 1].item() for mode, belief in found.items()}
    spread = {mode: belief.std[0, LENGTH // 2, 1].item() for mode, belief in found.items()}
    assert abs(aside["expected"]) < HALF_WIDTH
    assert aside["likeliest mode"] < -2 * HALF_WIDTH
    # Only the mean says that the true action may be far off.
    assert spread["expected"] > 4 * spread["likeliest mode"]
    for belief in found.values():
        assert belief.mode_probability.item() == pytest.approx(SHARE)


def test_a_drawn_class_is_one_of_the_ways(by_class: Decode) -> None:
    aside = by_class("sample").actions[0, LENGTH // 2, 1]
    assert aside.abs() > 2 * HALF_WIDTH
