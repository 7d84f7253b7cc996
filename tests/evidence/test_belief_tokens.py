"""Probabilities decode to their mean; where a policy is certain, every way gives what its tokens decode to."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rfsq.evidence.belief_tokens import (
    DRAWN,
    DRAWN_MODE,
    EXPECTED,
    LIKELIEST,
    TRUE_MODE,
    WITHIN,
    OneByOne,
    OnePass,
    StepTokens,
    TwoPasses,
)
from rfsq.evidence.faster import FasterConfig, FasterNetwork
from rfsq.evidence.oat import OatConfig, OatNetwork
from rfsq.evidence.policies import TokenPolicy
from rfsq.evidence.policy_tokens import BinTokens, NetworkTokens, PolicyTokens, chunk_tokens
from rfsq.evidence.schemes import BinRange, fit_bins
from rfsq.rfsq_ref.autoencoder import ModelConfig
from rfsq.rfsq_ref.chunk_code import ChunkCode, ChunkSizes
from rfsq.rfsq_ref.data import EpisodeSplit
from rfsq.rfsq_ref.quantizer import Conditioning
from tests.chunk_bundles import random_constants
from tests.rfsq_ref.models import make_model

COUNT, SHAPE = 5, (8, 7)


class Certain(TokenPolicy):
    """Says these tokens [n, L], one row for each context, or mixes them with others at so many to one."""

    def __init__(self, tokens: Tensor, vocabulary: int, others: Tensor | None = None) -> None:
        torch.nn.Module.__init__(self)
        self.num_tokens = tokens.shape[1]
        self._p = functional.one_hot(tokens, vocabulary).double()
        if others is not None:
            self._p = (self._p + functional.one_hot(others, vocabulary)) / 2

    def forward(self, context: Tensor, tokens: Tensor) -> Tensor:
        assert tokens.shape[1] == self.num_tokens - 1
        return self._p[context[:, 0].long()].clamp(min=1e-300).log()

    def say(self, context: Tensor, count: int | None = None, draw: torch.Generator | None = None) -> Tensor:
        assert count is None
        p = self._p[context[:, 0].long()]
        if draw is None:
            return p.argmax(-1)
        return torch.multinomial(p.flatten(0, 1), 1, generator=draw).reshape(p.shape[:2])


CONTEXTS = torch.arange(COUNT, dtype=torch.float32).unsqueeze(1)


def random_tokens(tokens: PolicyTokens, length: int, seed: int = 0) -> Tensor:
    return torch.randint(tokens.vocabulary, (COUNT, length), generator=torch.Generator().manual_seed(seed))


def bins(split: EpisodeSplit) -> BinTokens:
    return BinTokens("8 bins", 8, fit_bins(split.train.steps(), BinRange.FULL, 3), SHAPE)


@pytest.fixture(params=["bins", "steps", "OAT", "residual VQ"])
def at_once(request: pytest.FixtureRequest, split: EpisodeSplit) -> tuple[PolicyTokens, int]:
    """Tokens that are said at once, and how many there are."""
    torch.manual_seed(0)
    if request.param == "bins":
        return bins(split), 56
    if request.param == "steps":
        model = make_model(ModelConfig(latent_dim=4, hidden_width=8, num_layers=3), Conditioning.CALIBRATED).double()
        return StepTokens("steps", model.config.num_levels, model, 8, 2), 8 * model.config.latent_dim * 2
    if request.param == "OAT":
        oat = OatNetwork(OatConfig(8, (1, 4), dropout=0.0, width=16, levels=(3, 3)), 7).eval()
        return NetworkTokens("OAT", oat.vocabulary, oat), 4
    network = FasterNetwork(FasterConfig(layers=2, codebook_size=8, code_dim=4, width=16, depth=1), 7).eval()
    torch.nn.init.normal_(network.codebooks.entries)
    return NetworkTokens("residual VQ", 8, network), 2 * network.config.patches


def test_what_is_certain_is_expected(at_once: tuple[PolicyTokens, int]) -> None:
    tokens, length = at_once
    said = random_tokens(tokens, length)
    believer = OnePass(tokens)
    with torch.no_grad():
        found = believer.decoded(Certain(said, tokens.vocabulary), CONTEXTS, said)
        decoded = tokens.decode(said).double()
    assert tuple(found) == believer.ways
    for way, actions in found.items():
        torch.testing.assert_close(actions.double(), decoded, atol=1e-5, rtol=1e-5, msg=way)


def test_of_bins_the_mean_is_expected(split: EpisodeSplit) -> None:
    tokens = bins(split)
    first, second = random_tokens(tokens, 56), random_tokens(tokens, 56, seed=1)
    found = OnePass(tokens).decoded(Certain(first, 8, second), CONTEXTS, first)
    torch.testing.assert_close(found[EXPECTED], ((tokens.decode(first) + tokens.decode(second)) / 2).double())


@pytest.fixture
def two_passes() -> TwoPasses:
    sizes = ChunkSizes(7, 8, num_classes=8, token_bits=8, num_tokens=12)
    code = ChunkCode(sizes, random_constants(sizes, 0)).double()
    return TwoPasses(next(each for each in chunk_tokens(code, "own order") if each.cut[0] == 3), most_classes=3)


def chunks_said(believer: TwoPasses, seed: int = 0) -> Tensor:
    """Words that each token has, escape not among them."""
    said = random_tokens(believer.tokens, len(believer.tokens.cut), seed)
    sizes = torch.tensor([(1 << size) - 1 for size in believer.tokens.cut])
    sizes[0] -= 1
    return torch.minimum(said, sizes)


def test_in_two_passes_what_is_certain_is_decoded_in_every_way(two_passes: TwoPasses) -> None:
    said = chunks_said(two_passes)
    found = two_passes.decoded(Certain(said, two_passes.tokens.vocabulary), CONTEXTS, said)
    assert set(found) == {LIKELIEST, WITHIN, DRAWN_MODE, EXPECTED, TRUE_MODE}
    for way, actions in found.items():
        torch.testing.assert_close(actions, two_passes.tokens.decode(said), msg=way)


def test_of_two_classes_one_is_the_mode_and_both_are_expected(two_passes: TwoPasses) -> None:
    first = chunks_said(two_passes)
    second = first.clone()
    second[:, 0] = (first[:, 0] + 1) % 7
    policy = Certain(first, two_passes.tokens.vocabulary, second)
    decoded = [two_passes.tokens.decode(said) for said in (first, second)]
    answers = two_passes.ask(policy, CONTEXTS)
    generator = torch.Generator().manual_seed(0)
    mean = two_passes.decode(answers, EXPECTED, generator)
    torch.testing.assert_close(mean, (decoded[0] + decoded[1]) / 2, atol=1e-6, rtol=0)
    drawn = [two_passes.decode(answers, DRAWN_MODE, generator) for _ in range(20)]
    for chunk in (*drawn, two_passes.decode(answers, WITHIN, generator)):
        errors = torch.stack([(chunk - each).abs().flatten(1).amax(1) for each in decoded])
        assert (errors.amin(0) < 1e-6).all()
    # Each class is drawn now and then.
    assert torch.stack(drawn).std(0).amax() > 1e-3
    true = two_passes.decoded(policy, CONTEXTS, second)[TRUE_MODE]
    torch.testing.assert_close(true, decoded[1], atol=1e-6, rtol=0)


def test_drawn_chunks_are_averaged(split: EpisodeSplit) -> None:
    tokens = bins(split)
    first, second = random_tokens(tokens, 56), random_tokens(tokens, 56, seed=1)
    found = OneByOne(tokens, SHAPE, draws=4000).decoded(Certain(first, 8, second), CONTEXTS, first)
    assert set(found) == {LIKELIEST, DRAWN}
    mean = ((tokens.decode(first) + tokens.decode(second)) / 2).double()
    assert (found[DRAWN] - mean).abs().max() < 0.1
