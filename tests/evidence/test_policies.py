"""A policy sees what it may see, says the likeliest tokens, and learns what can be learnt."""

import pytest
import torch
from torch import Tensor

from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.policies import NOTHING, PolicyConfig, RegressionPolicy, TokenPolicy, train_policy

SMALL = PolicyConfig(width=16, depth=2, heads=2, dropout=0.0, steps=150, batch=32, learning_rate=1e-2, warm_up=10)
CONTEXT, VOCABULARY, LENGTH = 3, 7, 5


def policy(config: PolicyConfig = SMALL) -> TokenPolicy:
    torch.manual_seed(0)
    return TokenPolicy(CONTEXT, VOCABULARY, LENGTH, config).eval()


def some(count: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (count, LENGTH), generator=generator)
    return torch.randn(count, CONTEXT, generator=generator), tokens


@pytest.mark.parametrize("place", range(LENGTH - 1))
def test_a_token_changes_what_is_said_behind_it_and_nothing_before(place: int) -> None:
    model, (context, tokens) = policy(), some()
    other = tokens.clone()
    other[:, place] = (other[:, place] + 1) % VOCABULARY
    before, after = model(context, tokens[:, :-1]), model(context, other[:, :-1])
    torch.testing.assert_close(before[:, : place + 1], after[:, : place + 1])
    assert (before[:, place + 1 :] != after[:, place + 1 :]).any(dim=-1).all()


@pytest.mark.parametrize("shown", [0, 1, 3])
def test_tokens_that_are_not_shown_change_nothing(shown: int) -> None:
    model, (context, tokens) = policy(PolicyConfig(16, 2, 2, shown=shown)), some()
    other = tokens.clone()
    other[:, shown:] = 0
    torch.testing.assert_close(model(context, tokens[:, :-1]), model(context, other[:, :-1]))


@pytest.mark.parametrize("shown", [0, 1, 3, None])
def test_each_token_said_is_the_likeliest_behind_those_before(shown: int | None) -> None:
    model, (context, _) = policy(PolicyConfig(16, 2, 2, shown=shown)), some()
    said = model.say(context)
    assert said.shape == (len(context), LENGTH)
    assert torch.equal(model(context, said[:, :-1]).argmax(dim=-1), said)


def test_a_place_without_a_token_is_not_trained() -> None:
    model, (context, tokens) = policy(), some()
    shorter = tokens.clone()
    shorter[:, 3:] = NOTHING
    logits = model(context, tokens[:, :-1])[:, :3]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, :3].flatten())
    torch.testing.assert_close(model.loss(context, shorter), expected)


@pytest.mark.parametrize("shown", [0, 1, None])
def test_what_follows_from_the_context_is_learnt(shown: int | None) -> None:
    config = PolicyConfig(**{**vars(SMALL), "shown": shown})
    context, _ = some(64)
    tokens = (context[:, :1] > 0).long() + torch.arange(LENGTH)
    model = policy(config)
    assert train_policy(model, context, tokens, seed=0) < 0.3
    assert (model.say(context) == tokens).double().mean() > 0.95


def test_what_follows_from_the_token_before_is_learnt_by_a_policy_that_sees_it_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    context = torch.zeros(256, CONTEXT)
    tokens = torch.randint(VOCABULARY, (256, 1), generator=generator).expand(-1, LENGTH)
    losses = {}
    for shown in (0, None):
        model = policy(PolicyConfig(**{**vars(SMALL), "shown": shown}))
        losses[shown] = train_policy(model, context, tokens, seed=0)
    # The first token is a guess among seven: ln 7 / 5 of the mean.
    assert losses[None] < 0.6 < 1.5 < losses[0]


def test_the_same_seed_trains_the_same_policy() -> None:
    context, tokens = some(64)
    weights = []
    for seed in (0, 0, 1):
        model = policy()
        train_policy(model, context, tokens, seed)
        weights.append(model.head.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_regression_learns_a_line() -> None:
    context, _ = some(64)
    torch.manual_seed(0)
    model = RegressionPolicy(CONTEXT, 2, SMALL)
    chunks = torch.stack((context[:, 0], context[:, 1] - context[:, 2]), dim=1)
    assert train_policy(model, context, chunks, seed=0) < 0.05 * float(chunks.var())


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(EvidenceError, match="width 10 does not divide into 4 heads"):
        PolicyConfig(width=10)
