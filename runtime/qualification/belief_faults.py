"""What a policy may make of its beliefs: such as are refused, and such as are too uncertain to be acted on."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ..bundle.arrays import Codes, Float32Array
from ..bundle.models import ChunkModel
from ..bundle.probabilities import class_of_tokens
from .rig import LEAST_PROBABILITY, Answer, Rig

#: Makes what `step` is given of the probabilities of a chunk, [1, T, D, L, K] or [1, L, V], which it may alter.
Change = Callable[[Float32Array, Rig], dict[str, Any]]


def sent(change: Change, rig: Rig) -> Answer:
    """A chunk's probabilities, altered."""
    chunk = rig.pick()
    return rig.send(chunk, **{"tokens": None, **change(rig.certain(chunk), rig)})


def _with(kind: str, value: float, probabilities: Float32Array, rig: Rig) -> dict[str, Any]:
    probabilities.reshape(-1)[rig.rng.randrange(probabilities.size)] = value
    return {kind: probabilities}


def _scaled(probabilities: Float32Array, rig: Rig) -> dict[str, Any]:
    """One distribution sums to another number than 1."""
    rows = probabilities.reshape(-1, probabilities.shape[-1])
    rows[rig.rng.randrange(len(rows))] *= rig.rng.choice((0, 0.5, 0.98, 1.02, 2))
    return {"probabilities": probabilities}


def _nothing_allowed(logits: Float32Array, rig: Rig) -> dict[str, Any]:
    rows = logits.reshape(-1, logits.shape[-1])
    rows[rig.rng.randrange(len(rows))] = -math.inf
    return {"logits": logits}


def _another_form(probabilities: Any, rig: Rig) -> dict[str, Any]:
    wrong: tuple[Any, ...] = (
        probabilities[0],
        probabilities[None],
        probabilities[:0],
        probabilities[..., :0, :],
        probabilities[..., 1:],
        np.concatenate((probabilities, probabilities)),
        probabilities.reshape(-1),
        probabilities.astype(rig.rng.choice(("float16", "float64", ">f4", "int32", "complex64", "bool"))),
        probabilities.tolist(),
        np.ma.masked_array(probabilities, mask=True),
        (probabilities, probabilities),
        (),
        "probabilities",
        object(),
    )
    return {rig.rng.choice(("logits", "probabilities")): rig.rng.choice(wrong)}


def _beside(probabilities: Float32Array, rig: Rig) -> dict[str, Any]:
    """Tokens, logits or stats beside the probabilities."""
    beside = rig.rng.choice((
        {"tokens": rig.pick().tokens},
        {"logits": probabilities},
        {"stats": np.ones((1, rig.length, 1, 2), np.float32)},
    ))  # fmt: skip
    return {"probabilities": probabilities, **beside}


#: Refused as tokens are that do not exist.
BAD_BELIEFS: dict[str, Change] = {
    "probabilities with NaN": partial(_with, "probabilities", math.nan),
    "negative probability": partial(_with, "probabilities", -0.25),
    "probabilities that sum to another number": _scaled,
    "logits with NaN": partial(_with, "logits", math.nan),
    "infinite logit": partial(_with, "logits", math.inf),
    "logits that allow nothing": _nothing_allowed,
    "belief of another form": _another_form,
    "tokens, logits or stats beside probabilities": _beside,
}


def flat(rig: Rig) -> Answer:
    """All tokens are as likely as each other."""
    certain = rig.certain(rig.pick())
    return rig.believe(np.full_like(certain, 1 / certain.shape[-1]))


def flipping(rig: Rig) -> Answer:
    """One mode is a little likelier, and then the other."""
    ways = _two_modes(rig, 0.55), _two_modes(rig, 0.45)
    return [rig.believe(ways[number % 2]) for number in range(rig.rng.randint(1, 3))][-1]


def trembling(rig: Rig) -> Answer:
    """After too little certainty comes a little more than would have been enough before."""
    rig.believe(_two_modes(rig, LEAST_PROBABILITY - 0.05))
    return rig.believe(_two_modes(rig, LEAST_PROBABILITY + 0.02))


def late(rig: Rig) -> Answer:
    """While another chunk is in service."""
    rig.send(rig.pick())
    return rig.believe(rig.certain(rig.pick()), age=2 * rig.length + 2, sequence=rig.sequence + 1)


def again(rig: Rig) -> Answer:
    """What was served as tokens comes as a belief, under the same number."""
    chunk = rig.pick()
    rig.send(chunk)
    return rig.believe(rig.certain(chunk), sequence=rig.sequence, age=1)


def longer(rig: Rig) -> Answer:
    """The belief of a draft, and on the next tick of its whole."""
    chunk, prefix = rig.pick(), rig.rng.choice(rig.model.prefixes[:-1] or rig.model.prefixes)
    draft = rig.decoded(Codes(chunk.tokens, None).prefix(prefix))
    answer = rig.believe(rig.certain(draft))
    if prefix == rig.model.prefixes[-1] or rig.length == 1:
        return answer
    return rig.believe(rig.certain(chunk), sequence=rig.sequence, age=1)


def _two_modes(rig: Rig, share: float) -> Float32Array:
    """A chunk of which one mode has this probability, and another one the rest."""
    chunk = rig.chunks[0]
    found, first = rig.certain(chunk), int(chunk.tokens.reshape(-1)[0])
    other = (first + 1) % rig.model.vocabulary
    if isinstance(rig.model, ChunkModel):
        # Of another class.
        ends = 0, rig.model.vocabulary - 1
        classes = class_of_tokens(np.array([[first], *([end] for end in ends)], np.int32), rig.model)
        other = ends[int(classes[1] == classes[0])]
    row = found.reshape(-1, rig.model.vocabulary)[0]
    row[first], row[other] = share, 1 - share
    return found
