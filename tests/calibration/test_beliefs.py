"""Temperatures and scales are those that the data have, and both are judged on episodes that nothing was fitted to."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rfsq.calibration.beliefs import (
    BitLogits,
    Choice,
    PolicyLogits,
    StepLogits,
    TokenLogits,
    calibrate_beliefs,
    calibration_error,
    fit_temperature,
    reliability,
    said_of,
    settings_of,
)
from rfsq.calibration.errors import CalibrationError
from rfsq.rfsq_ref.autoencoder import ModelConfig
from rfsq.rfsq_ref.beliefs import bits_of_tokens
from rfsq.rfsq_ref.quantizer import Conditioning
from rfsq.runtime.bundle.beliefs import Belief, BeliefKind, BeliefMode
from tests.chunk_bundles import ChunkRecipe, chunk_checkpoint
from tests.rfsq_ref.models import make_model, random_actions

KIND = BeliefKind("0" * 64, "tokens", 2, 1)


def drawn_choice(count: int, vocabulary: int, temperature: float, seed: int = 0) -> Choice:
    """Of a policy whose logits must be divided by this to be right."""
    generator = torch.Generator().manual_seed(seed)
    true = 2 * torch.randn(count, vocabulary, generator=generator).double()
    taken = torch.multinomial(true.softmax(-1), 1, generator=generator)[:, 0]
    return Choice("some", true * temperature, taken)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_temperature_of_the_policy_is_found(temperature: float) -> None:
    choice = drawn_choice(20_000, 7, temperature)
    assert fit_temperature(choice) == pytest.approx(temperature, rel=0.03)


def test_no_other_temperature_is_likelier() -> None:
    choice = drawn_choice(500, 5, 2.0)
    best = fit_temperature(choice)

    def likelihood(value: float) -> float:
        return float((choice.logits / value).log_softmax(-1).gather(1, choice.taken.unsqueeze(1)).mean())

    assert all(likelihood(best) >= likelihood(best * factor) for factor in (0.5, 0.98, 1.02, 2.0))


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_a_policy_that_knows_nothing_or_all_has_a_temperature_within_limits(size: float) -> None:
    logits = size * torch.randn(200, 4, generator=torch.Generator().manual_seed(0)).double()
    for taken in (logits.argmax(-1), logits.argmin(-1), torch.arange(200) % 4):
        assert 1 / 20 <= fit_temperature(Choice("some", logits, taken)) <= 100


def test_forbidden_words_change_nothing() -> None:
    choice = drawn_choice(500, 5, 2.0)
    forbidden = torch.full((500, 2), -torch.inf).double()
    longer = replace(choice, logits=torch.cat((choice.logits, forbidden), dim=1))
    assert fit_temperature(longer) == pytest.approx(fit_temperature(choice), rel=1e-6)


def test_the_calibration_error_is_how_far_confidence_is_from_accuracy() -> None:
    # Two words: always 0.9 sure, right seven times of ten.
    logits = torch.tensor([[math.log(9.0), 0.0]]).double().expand(10, -1)
    choice = Choice("some", logits, torch.tensor([0] * 7 + [1] * 3))
    assert calibration_error([said_of(choice)]) == pytest.approx(0.2)
    found = reliability([said_of(choice)])
    assert (found.confidence, found.accuracy, found.share) == (pytest.approx((0.9,)), pytest.approx((0.7,)), (1.0,))
    assert calibration_error([said_of(drawn_choice(50_000, 7, 1.0))]) < 0.01


class Spread(PolicyLogits):
    """Actions off by what a Gaussian of the standard deviation that is told, times `factor`, gives."""

    def __init__(self, count: int, factor: float) -> None:
        self.kind = KIND
        generator = torch.Generator().manual_seed(0)
        self.actions = torch.zeros(count, 3, 2).double()
        self._std = 0.1 + torch.rand(count, 3, 2, generator=generator).double()
        self._off = factor * self._std * torch.randn(count, 3, 2, generator=generator).double()

    def choices(self, rows: Tensor) -> list[Choice]:
        return [drawn_choice(len(rows), 4, 1.0)]

    def belief(self, rows: Tensor, temperature: Tensor, mode: BeliefMode) -> Belief[Tensor]:
        assert temperature.shape == (1,)
        assert mode in ("expected", "likeliest mode")
        return Belief(self._off[rows], self._std[rows], torch.ones(len(rows)), torch.zeros(len(rows)))


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_scales_make_spreads_honest_on_episodes_that_were_not_fitted(factor: float) -> None:
    report = calibrate_beliefs(Spread(6000, factor), [index // 100 for index in range(6000)])
    assert (report.episodes, report.folds) == (60, 5)
    for spread in report.spreads:
        assert spread.scale == pytest.approx((factor, factor), rel=0.06)
        assert abs(spread.within_one[0] - 0.6827) > 0.2
        assert spread.within_one[1] == pytest.approx(0.6827, abs=0.02)
        assert spread.within_two[1] == pytest.approx(0.9545, abs=0.01)
    settings = settings_of(report)
    assert settings.kind == KIND
    assert settings.temperature == (report.choices[0].temperature,)
    assert settings.std_scale == {spread.mode: spread.scale for spread in report.spreads}


def test_each_episode_is_judged_by_a_fit_that_leaves_it_out() -> None:
    given = Spread(2000, 1.0)
    given._off[1000:] *= 16
    report = calibrate_beliefs(given, [0] * 1000 + [1] * 1000)
    for spread in report.spreads:
        # All errors of the first, judged by the scale of the second, and few the other way round.
        assert spread.within_one[1] == pytest.approx((1 + math.erf(1 / 16 / math.sqrt(2))) / 2, abs=0.01)
        assert spread.within_two[1] == pytest.approx((1 + math.erf(2 / 16 / math.sqrt(2))) / 2, abs=0.01)


def test_spreads_of_nothing_have_no_scale_and_the_shares_are_those_of_the_robot() -> None:
    given = Spread(600, 1.0)
    given._std[:, :, 1] = 0
    report = calibrate_beliefs(given, [index // 100 for index in range(600)])
    for spread in report.spreads:
        assert spread.scale is None
        # Half of all actions have a spread, of one deviation.
        assert spread.within_one[1] == spread.within_one[0] == pytest.approx(0.6827 / 2, abs=0.03)
    assert settings_of(report).std_scale == {}
    assert sum("which no scale makes honest" in remark for remark in report.remarks) == 2


@pytest.mark.parametrize(
    ("logits", "word"), [(torch.zeros(600, 4), "knows nothing"), (2 * torch.eye(4).repeat(150, 1), "always right")]
)
def test_a_temperature_at_its_limit_is_remarked_on(logits: Tensor, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, taken = Spread(600, 1.0), torch.arange(600) % 4
    said = logits.double() + 1e-3 * torch.arange(4)
    monkeypatch.setattr(given, "choices", lambda rows: [Choice("some", said[rows], taken[rows])])
    remarks = calibrate_beliefs(given, [index // 100 for index in range(600)]).remarks
    assert any(word in remark for remark in remarks)


def test_one_episode_cannot_be_fitted_and_judged() -> None:
    with pytest.raises(CalibrationError, match="all windows are of 1 episode; expected two at least"):
        calibrate_beliefs(Spread(10, 1.0), [7] * 10)


def test_a_policy_that_says_the_recorded_tokens_needs_nothing_and_is_certain() -> None:
    """Both kinds of tokens, in every form: the choices are those of the recorded chunks."""
    generator = torch.Generator().manual_seed(0)
    model = make_model(ModelConfig(latent_dim=3, hidden_width=8, num_layers=2), Conditioning.CALIBRATED).double()
    steps = random_actions(4 * 6).double().reshape(6, 4, 7)
    sharp = 20 * torch.nn.functional.one_hot(model.encode(steps)[0], model.config.num_levels).double()
    chunk = chunk_checkpoint(ChunkRecipe()).model(dtype=torch.float64)
    chunks = (torch.rand(6, 4, 3, generator=generator).double() * 1.6 - 0.8) * chunk.units + chunk.offset
    tokens = chunk.encode(chunks)
    of_words = torch.nn.functional.one_hot(tokens, 256).double()
    bits = bits_of_tokens(of_words, chunk.sizes)
    own = bits.bits[torch.arange(6), bits.classes.argmax(1)]
    for given in (
        StepLogits(KIND, model, steps, sharp),
        TokenLogits(KIND, chunk, chunks, 20 * of_words),
        BitLogits(KIND, chunk, chunks, 20 * bits.classes, 40 * own - 20),
    ):
        for choice in given.choices(torch.arange(6)):
            assert (choice.logits.argmax(-1) == choice.taken).all(), choice.name
        report = calibrate_beliefs(given, [0, 0, 0, 1, 1, 1])
        assert all(choice.nll[0] < 1e-4 for choice in report.choices)
        count = len(given.choices(torch.arange(6)))
        for mode in ("expected", "likeliest mode"):
            belief = given.belief(torch.arange(6), torch.ones(count).double(), mode)
            decoded = model.decode(model.encode(steps)[0]) if isinstance(given, StepLogits) else chunk.decode(tokens)
            torch.testing.assert_close(belief.actions, decoded, atol=1e-4, rtol=1e-4)
