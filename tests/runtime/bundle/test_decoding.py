"""The constants of decoding: what is written is read, and nothing else is."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from rfsq.rfsq_ref.chunk_code import ranks
from rfsq.runtime.bundle.array_file import write_arrays
from rfsq.runtime.bundle.arrays import AnyArray
from rfsq.runtime.bundle.decoding import MOST_BITS, Decoding, bit_places, read_decoding, write_decoding
from rfsq.runtime.bundle.errors import BundleError
from rfsq.runtime.bundle.models import ChunkModel, StepModel
from tests.bundles import Recipe, decoding_of, deploy, model_entry
from tests.chunk_bundles import ChunkRecipe, deployed_chunk_tokens

CHUNK = deployed_chunk_tokens(ChunkRecipe())
STEP = deploy(Recipe())
Model = ChunkModel | StepModel
KINDS: list[tuple[Decoding, Model]] = [(CHUNK.decoding(), CHUNK.model), (decoding_of(STEP), model_entry(STEP))]


def arrays(decoding: Decoding) -> dict[str, AnyArray]:
    """By the names that they have in the file."""
    found = {name: part for name, part in vars(decoding).items() if not isinstance(part, dict)}
    for name, kept in (("matrix", "matrices"), ("offset", "offsets")):
        found |= {f"{name}_{prefix}": part for prefix, part in getattr(decoding, kept, {}).items()}
    return found


@pytest.mark.parametrize(("decoding", "model"), KINDS, ids=["chunk", "step"])
def test_what_is_written_is_read(decoding: Decoding, model: Model) -> None:
    content = write_decoding(decoding)
    assert content == write_arrays(arrays(decoding))
    found = arrays(read_decoding(content, model))
    assert found.keys() == arrays(decoding).keys()
    for name, part in arrays(decoding).items():
        np.testing.assert_array_equal(found[name], part)
        assert not found[name].flags.writeable


@pytest.mark.parametrize(("decoding", "model"), KINDS, ids=["chunk", "step"])
def test_every_array_has_to_be_there_and_of_the_models_sizes(decoding: Decoding, model: Model) -> None:
    whole = arrays(decoding)
    for name, part in whole.items():
        altered: list[tuple[dict[str, AnyArray], str]] = [
            ({key: other for key, other in whole.items() if key != name}, f"lacks .*{name}"),
            (whole | {name: part[:-1]}, f"has {name}.npy that begins with"),
            (whole | {name: part.astype(np.float64)}, f"has {name}.npy that begins with"),
            (whole | {"more": part}, r"lacks \[\] and has the unknown members .*more"),
        ]
        if part.dtype == np.float32:
            broken = part.copy()
            broken.flat[-1] = np.nan
            altered.append((whole | {name: broken}, f"has {name} that is not finite"))
        for found, message in altered:
            with pytest.raises(BundleError, match=rf"decoding\.npz {message}.*build it again"):
                read_decoding(write_arrays(found), model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1], "is not an .npz"),
        (lambda content: content + b"more", "in another form than the build writes"),
        (lambda _: b"", "is not an .npz"),
    ],
)
def test_other_bytes_are_refused(change: Callable[[bytes], bytes], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        read_decoding(change(write_decoding(CHUNK.decoding())), CHUNK.model)


def test_an_order_names_latents_that_there_are_no_more_often_than_they_have_bits() -> None:
    decoding, latents = CHUNK.decoding(), CHUNK.model.num_latents
    for index, value in ((0, -1), (0, latents)):
        order = decoding.order.copy()
        order[0, index] = value
        with pytest.raises(BundleError, match=f"an order of latents outside 0 ... {latents - 1}"):
            read_decoding(write_decoding(replace(decoding, order=order)), CHUNK.model)
    order = decoding.order.copy()
    order[0, : MOST_BITS + 1] = 0
    with pytest.raises(BundleError, match=f"names a latent more than {MOST_BITS} times"):
        read_decoding(write_decoding(replace(decoding, order=order)), CHUNK.model)


def test_a_width_is_above_0() -> None:
    width = CHUNK.decoding().width.copy()
    width[0, 0, 3] = 0
    with pytest.raises(BundleError, match="a width that is not above 0"):
        read_decoding(write_decoding(replace(CHUNK.decoding(), width=width)), CHUNK.model)


def test_places_are_those_of_the_bits_of_each_latent_in_their_order() -> None:
    order = np.array([[1, 0, 1, 1], [2, 2, 0, 0]])
    assert bit_places(order, 3).tolist() == [[[1, 4, 4], [0, 2, 3], [4, 4, 4]], [[2, 3, 4], [4, 4, 4], [0, 1, 4]]]


def test_places_agree_with_the_ranks_of_the_reference() -> None:
    code = CHUNK.reference.model.code
    places, rank = bit_places(code.order.numpy(), code.scale.shape[1]), ranks(code.order).numpy()
    classes = np.arange(len(places))[:, None]
    np.testing.assert_array_equal(
        places[classes, code.order.numpy(), rank], np.arange(rank.shape[1]) + np.zeros_like(classes)
    )
    assert places.shape[2] == rank.max() + 1
    assert (places < rank.shape[1]).sum() == rank.size
