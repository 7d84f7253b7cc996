"""Numbers beside a model in its checkpoint that look like a normaliser of its actions.

There is no agreed way to write them, so they are reported and not used: a person passes them as a normaliser file.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from rfsq.runtime.bundle.checkpoint_states import is_tensor_name

# Words of a name, whatever joins them: `action_mean`, `norm_stats`, `normalizer.std`, `unnormalize_outputs`.
_WORD = re.compile(
    r"(?:un|de)?norm(?:al\w*)?|stat(?:s|istics?)?|mean|std|var|min|max|low|high|scaler?|offset|shift|loc|range|bounds?"
    r"|quantiles?|percentiles?|q[0-9]+|p[0-9]+",
    re.IGNORECASE,
)
_WORDS = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+")
# Moments of an optimiser are as many as the biases that they belong to.
_OPTIMIZER = re.compile(r"optim|opt$|opt_", re.IGNORECASE)
# Enough for `norm_stats`, the data set, `action` and `q01`, and what a training script wraps around them.
_DEPTH = 8


def left_statistics(content: Mapping[Any, Any], action_dim: int) -> list[str]:
    """Dotted paths to `action_dim` numbers, where a name on the path says mean, scale, statistics or the like.

    A single number counts where its own name also says that it is of actions.

    >>> left_statistics({"weights": {}, "norm_stats": {"action": {"mean": [0.0, 0.1, 0.2]}}}, action_dim=3)
    ['norm_stats.action.mean']
    """
    return list(_statistics(content, (), action_dim, set()))


def _statistics(node: Any, path: tuple[str, ...], action_dim: int, seen: set[int]) -> Iterator[str]:
    if _is_of_actions(node, path, action_dim):
        yield ".".join(path)
    elif isinstance(node, Mapping | list | tuple) and len(path) < _DEPTH and id(node) not in seen:
        seen.add(id(node))
        for name, value in node.items() if isinstance(node, Mapping) else enumerate(node):
            if not _OPTIMIZER.match(str(name)) and not is_tensor_name(name):
                yield from _statistics(value, (*path, str(name)), action_dim, seen)


def _is_of_actions(node: Any, path: tuple[str, ...], action_dim: int) -> bool:
    words = [_WORDS.findall(name) for name in path]
    if not any(_WORD.fullmatch(word) for name in words for word in name):
        return False
    if isinstance(node, Tensor):
        is_single, is_row = node.numel() == 1, node.numel() == action_dim
    elif isinstance(node, list | tuple):
        is_single, is_row = False, len(node) == action_dim and all(map(_is_number, node))
    else:
        is_single, is_row = _is_number(node), False
    # `action_scale`, but not the mean of an action loss.
    return is_row or (is_single and len(words[-1]) == 2 and words[-1][0].lower() in ("action", "actions"))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
