"""What beliefs are judged on: logits around real tokens, and what the definition in float64 makes of them."""

import numpy as np
import torch

from rfsq.rfsq_ref.autoencoder import ActionAutoencoder
from rfsq.rfsq_ref.beliefs import BitProbabilities, chunk_belief, step_belief
from rfsq.rfsq_ref.chunk_model import ChunkTokenizer
from rfsq.runtime.backends.beliefs import coarse_layers
from rfsq.runtime.bundle.arrays import AnyArray, Float32Array, Int32Array
from rfsq.runtime.bundle.beliefs import Belief, BeliefMode
from rfsq.runtime.bundle.golden_beliefs import KEEPS_MODE, NUM_BELIEFS, GoldenBeliefs, prefix_of
from rfsq.runtime.bundle.models import ChunkModel, ModelEntry
from rfsq.runtime.bundle.probabilities import Given, class_of_tokens

#: By how much the logit of a real token is raised, of one chunk after the other. The last is certain.
_RAISED = (0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 15.0, np.inf)
#: The logit of a bit that is certain: even float64 leaves nothing of the other side.
_CERTAIN_BIT = 800.0


def belief_vectors(
    model: ActionAutoencoder | ChunkTokenizer,
    entry: ModelEntry,
    tokens: Int32Array,
    count: int = NUM_BELIEFS,
    seed: int = 0,
) -> GoldenBeliefs | None:
    """Of `count` chunks, with tokens [n, ...] of all layers again and again; None where tokens do not decode alone.

    model: in float64.
    """
    if entry.has_stats:
        return None
    random = np.random.default_rng(seed)
    rows = np.resize(tokens, (count, *tokens.shape[1:]))
    raised = np.resize(np.array(_RAISED), count)
    given = (
        _chunk_logits(entry, rows, raised, random)
        if isinstance(entry, ChunkModel)
        else (_raised_logits(rows, entry.vocabulary, raised, random),)
    )
    found = [
        [_belief(model, entry, prefix_of(given, entry, prefix), keeps_mode=keeps_mode) for keeps_mode in KEEPS_MODE]
        for prefix in entry.key_prefixes
    ]
    actions, std = (
        np.stack([[getattr(belief, name).numpy() for belief in modes] for modes in found])
        for name in ("actions", "std")
    )
    return GoldenBeliefs(given, actions, std, found[0][0].mode_probability.numpy())


def _raised_logits(indices: AnyArray, size: int, raised: AnyArray, random: np.random.Generator) -> Float32Array:
    """Logits [n, ..., size], random but for those of indices [n, ...], which are raised by [n]."""
    logits = random.normal(scale=1.5, size=(*indices.shape, size))
    is_chosen = indices[..., None] == np.arange(size)
    by = raised.reshape(-1, *[1] * indices.ndim)
    logits[np.isinf(by) & ~is_chosen] = -np.inf
    logits += np.where(is_chosen & np.isfinite(by), by, 0)
    return logits.astype(np.float32)


def _chunk_logits(model: ChunkModel, tokens: Int32Array, raised: AnyArray, random: np.random.Generator) -> Given:
    classes = class_of_tokens(tokens, model)
    # Few encoders send it.
    classes[3::8] = model.num_classes - 1
    digits = (tokens[..., None] >> np.arange(model.token_bits - 1, -1, -1) & 1).reshape(len(tokens), -1)
    signs = 2.0 * digits[:, model.class_bits :] - 1
    by = raised[:, None]
    bits = random.normal(scale=1.5, size=signs.shape) + np.where(np.isinf(by), 0, by) / 2 * signs
    bits = np.where(np.isinf(by), _CERTAIN_BIT * signs, bits)
    return _raised_logits(classes, model.num_classes, raised, random), bits.astype(np.float32)


def _belief(
    model: ActionAutoencoder | ChunkTokenizer, entry: ModelEntry, given: Given, *, keeps_mode: bool
) -> Belief[torch.Tensor]:
    mode: BeliefMode = "likeliest mode" if keeps_mode else "expected"
    first, *rest = (torch.from_numpy(part).double() for part in given)
    with torch.no_grad():
        if isinstance(model, ActionAutoencoder):
            return step_belief(model, first.softmax(-1), mode, coarse_layers(entry), None)
        bits = rest[0].sigmoid().unsqueeze(1).expand(-1, model.sizes.num_classes, -1)
        return chunk_belief(model, BitProbabilities(first.softmax(-1), bits), mode, None)
