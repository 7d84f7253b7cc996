"""Neural tokenizers of chunks: any prefix decodes, tokens are what codes were, training gains and keeps the best."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.faster import FasterConfig, FasterNetwork, ResidualCodebooks, arm_groups, nearest_entries
from rfsq.evidence.networks import ChunkNetwork, NetworkRecipe, network_codecs, train_network, validation_errors
from rfsq.evidence.oat import OatConfig, OatNetwork, ScalarQuantizer
from rfsq.rfsq_ref.normaliser import Normaliser
from rfsq.rfsq_ref.settings import NormaliserKind

_OAT = OatConfig(chunk_length=4, prefixes=(1, 3), levels=(4, 3), width=16, heads=2, encoder_depth=1, decoder_depth=1)
_FASTER = FasterConfig(
    chunk_length=4, span=2, groups=(2, 1), layers=3, codebook_size=16, code_dim=4, width=16, heads=2, depth=1
)
_NORMALISER = Normaliser(NormaliserKind.MIN_MAX, (1.0, 0.0, -2.0), (0.5, 2.0, 4.0))


def _chunks(count: int, seed: int = 0) -> Tensor:
    """[count, 4, 3] in the units of the normaliser above, smooth."""
    generator = torch.Generator().manual_seed(seed)
    phase = 6 * torch.rand(count, 1, 3, generator=generator)
    waves = torch.sin(phase + 0.3 * torch.arange(4).unsqueeze(-1))
    return waves * torch.tensor(_NORMALISER.scale) + torch.tensor(_NORMALISER.offset)


@pytest.fixture(params=[_OAT, _FASTER], ids=["OAT", "FASTerVQ"])
def network(request: pytest.FixtureRequest) -> ChunkNetwork:
    torch.manual_seed(0)
    kind = OatNetwork if request.param is _OAT else FasterNetwork
    made: ChunkNetwork = kind(request.param, 3, _NORMALISER)
    # Codebooks start at what they see.
    made.train().loss(made.normalised(_chunks(64)))
    return made.eval()


def test_every_prefix_decodes_and_later_tokens_do_not_change_it(network: ChunkNetwork) -> None:
    chunks = network.normalised(_chunks(5))
    with torch.no_grad():
        tokens = network.encode_chunks(chunks)
        other = (tokens + 1) % network.vocabulary
        for count in range(1, tokens.shape[1] + 1):
            decoded = network.decode_chunks(tokens[:, :count])
            assert decoded.shape == chunks.shape
            assert torch.isfinite(decoded).all()
            # One more token decodes to something else: nothing is ignored.
            assert count == 1 or not torch.equal(decoded, network.decode_chunks(tokens[:, : count - 1]))
            assert not torch.equal(decoded, network.decode_chunks(other[:, :count]))
    assert tokens.shape == (5, network.prefixes[-1])
    assert tokens.min() >= 0
    assert tokens.max() < network.vocabulary


def test_codecs_take_and_give_the_robots_units(network: ChunkNetwork) -> None:
    actions = _chunks(6).numpy()
    codecs = network_codecs(network, "family", "series")

    assert [codec.partial for codec in codecs] == [True] * (len(codecs) - 1) + [False]
    assert len({codec.name for codec in codecs}) == len(codecs)
    for codec in codecs:
        with torch.no_grad():
            decoded = network.decode_chunks(torch.from_numpy(codec.tokens(actions)))
        expected = decoded.numpy() * np.array(_NORMALISER.scale) + np.array(_NORMALISER.offset)
        np.testing.assert_allclose(codec.reconstruct(actions), expected, atol=1e-5)
        assert codec.bits_per_step(actions) == codec.prefix * np.log2(network.vocabulary) / 4


def test_training_gains_is_repeatable_and_keeps_the_best(network: ChunkNetwork) -> None:
    recipe = NetworkRecipe(steps=60, batch_size=32, learning_rate=5e-3, checks=4)
    start = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = []
    for _ in range(2):
        network.load_state_dict(start)
        before = validation_errors(network, network.normalised(_chunks(50, seed=1)))
        trained = train_network(network, _chunks(300), _chunks(50, seed=1), recipe)
        found.append(replace(trained, seconds=0.0))
        after = validation_errors(network, network.normalised(_chunks(50, seed=1)))

        assert after[-1] < 0.8 * before[-1]
        assert [check.step for check in trained.checks] == [15, 30, 45, 60]
        kept = next(check for check in trained.checks if check.step == trained.kept_step)
        np.testing.assert_allclose(after, kept.validation, rtol=1e-5)
        assert min(np.log(check.validation).sum() for check in trained.checks) == np.log(kept.validation).sum()
    assert found[0] == found[1]


def test_training_that_diverges_says_so(network: ChunkNetwork) -> None:
    broken = torch.full((40, 4, 3), torch.nan)
    with pytest.raises(EvidenceError, match="lower the learning rate"):
        train_network(network, broken, broken, NetworkRecipe(steps=2, checks=1))


def test_training_ends_when_its_time_is_over(network: ChunkNetwork) -> None:
    trained = train_network(
        network, _chunks(50), _chunks(10), NetworkRecipe(steps=10**9, seconds=0.3, batch_size=8, checks=2)
    )
    assert 2 <= trained.steps < 10**6


# OAT ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (2,), (3, 4)])
def test_tokens_of_scalars_are_all_numbers_below_the_product_of_levels(levels: tuple[int, ...]) -> None:
    quantizer = ScalarQuantizer(levels)
    every = torch.arange(int(np.prod(levels)))
    codes = quantizer.codes(every)

    assert torch.equal(quantizer.tokens(codes), every)
    assert len(torch.unique(codes, dim=0)) == len(every)
    assert codes.abs().max() <= 1
    # What is far out gets the outermost levels.
    for sign in (-30.0, 30.0):
        outermost = quantizer(torch.full((1, len(levels)), sign))
        assert torch.equal(outermost[0], codes.amin(dim=0) if sign < 0 else codes.amax(dim=0))


def test_a_register_sees_none_behind_it() -> None:
    torch.manual_seed(0)
    network = OatNetwork(_OAT, 3).eval()
    chunks = torch.randn(4, 4, 3)
    before = network.codes(chunks)
    with torch.no_grad():
        network.register_tokens[-1] += 10

    after = network.codes(chunks)

    assert torch.equal(before[:, :-1], after[:, :-1])


def test_oat_refuses_sizes_that_do_not_go_together() -> None:
    for changes in ({"prefixes": (4, 2)}, {"prefixes": ()}, {"prefixes": (0, 1)}, {"levels": (1,)}, {"width": 0}):
        with pytest.raises(EvidenceError):
            replace(_OAT, **changes)  # type: ignore[arg-type]


# FASTerVQ -------------------------------------------------------------------------------------------------------------


def test_patches_are_cut_and_put_together_again() -> None:
    network = FasterNetwork(_FASTER, 3)
    chunks = torch.arange(24.0).reshape(2, 4, 3)

    patches = network.patches(chunks)

    assert patches.shape == (2, 4, 4)
    # The first two steps of the first two dimensions; the first two steps of the last, filled up with zeros.
    assert patches[0, 0].tolist() == [0, 1, 3, 4]
    assert patches[0, 1].tolist() == [2, 0, 5, 0]
    assert torch.equal(network.picture(patches), chunks)


def test_codebooks_learn_clusters_and_name_the_nearest() -> None:
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [5.0, 5.0], [-5.0, 5.0], [5.0, -5.0]])
    codebooks = ResidualCodebooks(layers=2, size=16, dim=2)
    for _ in range(200):
        codebooks(centres[torch.randint(4, (64,))] + 0.1 * torch.randn(64, 2))
    codebooks.eval()

    tokens, codes, _ = codebooks(centres)

    assert len(set(tokens[:, 0].tolist())) == 4
    assert (codes[:, 0] - centres).norm(dim=1).max() < 0.2
    assert torch.equal(tokens[:, 0], nearest_entries(centres, codebooks.entries[0]))
    # A second layer takes something off what the first has left.
    assert (codes.sum(dim=1) - centres).norm() <= (codes[:, 0] - centres).norm() + 0.2


@pytest.mark.parametrize(
    ("action_dim", "groups"), [(7, (3, 3, 1)), (14, (3, 3, 1, 3, 3, 1)), (4, (3, 1)), (6, (3, 3)), (1, (1,))]
)
def test_columns_of_patches_hold_all_dimensions(action_dim: int, groups: tuple[int, ...]) -> None:
    assert arm_groups(action_dim) == groups


def test_fastervq_refuses_sizes_that_do_not_go_together() -> None:
    with pytest.raises(EvidenceError, match="spans of 3 steps"):
        replace(_FASTER, span=3)
    with pytest.raises(EvidenceError, match="have not 5 dimensions"):
        FasterNetwork(_FASTER, 5)
