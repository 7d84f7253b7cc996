"""Beliefs for policies of torch: what the methods of both adapters share.

Not by an engine: in operations of torch, so that gradients reach what the policy says. The constants come from the
bundle, and are held against its golden vectors before they are used.
"""

from __future__ import annotations

import contextlib
import math
import threading
from typing import TypeVar, cast

import torch
from torch import Tensor

from ..backends.beliefs import coarse_layers
from ..bundle.advice import quoted
from ..bundle.belief_validation import BeliefValidator, check_mode, check_num_bits, check_num_tokens
from ..bundle.beliefs import Belief, BeliefMode
from ..bundle.comparison import action_errors, std_error
from ..bundle.compatibility import check_fingerprint
from ..bundle.decoding import ChunkDecoding, Decoding, read_decoding
from ..bundle.errors import BundleError, InvalidInputError, SelfTestError
from ..bundle.folder import open_bundle
from ..bundle.gates import GATES
from ..bundle.golden import read_golden
from ..bundle.golden_beliefs import GoldenBeliefs
from ..bundle.manifest import DECODING_NAME, GOLDEN_NAME
from ..bundle.models import ChunkModel, StepModel
from ..bundle.probabilities import Given
from .adapter_calls import Engines, uncompiled
from .belief_tensors import tensor_of
from .chunk_beliefs import ChunkBeliefs
from .step_beliefs import StepBeliefs
from .tensors import checked_tensor, runs_on_numbers

_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_Graph = StepBeliefs | ChunkBeliefs
_Given = TypeVar("_Given", bound=tuple[Tensor, ...])


class TensorBeliefs:
    """Decodes the beliefs of one bundle. Copies are the same object, and what is pickled reads the bundle again."""

    def __init__(self, engines: Engines) -> None:
        self._engines, self._model = engines, engines.on_host.manifest.model
        #: By device and type, once they are needed.
        self._graphs: dict[tuple[torch.device, torch.dtype], _Graph] = {}
        self._decoding: Decoding | None = None
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, object]) -> TensorBeliefs:
        return self

    def __reduce__(self) -> tuple[type[TensorBeliefs], tuple[Engines]]:
        return TensorBeliefs, (self._engines,)

    def decode(
        self,
        value: object,
        mode: BeliefMode,
        temperature: object,
        generator: torch.Generator | None,
        *,
        is_logits: bool,
    ) -> Belief[Tensor]:
        """See `BundleModule.decode_logits`."""
        check_mode(mode, None)
        if generator is not None and mode != "sample":
            raise InvalidInputError(f"a generator was given, and mode {mode!r} draws nothing; leave it out")
        validator = BeliefValidator(self._model)
        given, leading = self._given(value, validator, is_logits=is_logits)
        if given[0].is_cpu and runs_on_numbers():
            validator.check_values(_arrays(given), is_logits=is_logits)
        precise = torch.float64 if any(part.dtype is torch.float64 for part in given) else torch.float32
        given = tuple(part.to(precise) for part in given)
        graph = self._graph(given[0])
        sharpness = _sharpness(temperature, given, validator)
        with _without_autocast(given[0].device):
            found = graph.decode(given, sharpness, mode, generator, is_logits=is_logits)
        if self._model.token_grid:
            return found
        parts = (found.actions, found.std, found.mode_probability, found.mode)
        return Belief(*(part.reshape((*leading, *part.shape[1:])) for part in parts))

    def _given(
        self, value: object, validator: BeliefValidator, *, is_logits: bool
    ) -> tuple[tuple[Tensor, ...], torch.Size]:
        """Distributions [..., T, D, l, K] as they are, [..., l, V] or the pair [..., C] and [..., n] as [B, ...]; and
        the leading axes of chunks."""
        model, name = self._model, "logits" if is_logits else "probabilities"
        if isinstance(value, tuple) and validator.is_pair(name, value):
            return _pair(_floats("classes", value[0]), _floats("bits", value[1]), cast(ChunkModel, model))
        given = _floats(name, value)
        latents, shape = model.token_grid[1:], tuple(given.shape)
        expected = (*latents, *shape[-2:-1], model.vocabulary)
        if len(shape) < 2 + len(model.token_grid) or shape[-len(expected) :] != expected:
            letters = f"..., T, {latents[0]}, l" if latents else "..., l"
            pair = ""
            if isinstance(model, ChunkModel):
                pair = f", or a pair of classes [..., {model.num_classes}] and bits [..., n]"
            raise InvalidInputError(f"{name} have shape {[*shape]}; expected [{letters}, {model.vocabulary}]{pair}")
        check_num_tokens(name, shape, model)
        leading = given.shape[:-2]
        return (given if latents else given.reshape(math.prod(leading), *shape[-2:]),), leading

    def _graph(self, like: Tensor) -> _Graph:
        found = self._graphs.get((like.device, like.dtype))
        return self._made(like) if found is None else found

    @uncompiled
    def _made(self, like: Tensor) -> _Graph:
        """Raises InvalidInputError where a graph is being recorded: there its tensors would be stand-ins."""
        if not runs_on_numbers():
            raise InvalidInputError(
                "decode_logits is called for the first time while a graph is recorded, or inside torch.func, where its "
                "constants cannot be made: call it once before, with logits of the same device and type"
            )
        with self._lock, torch.inference_mode(False):
            if self._decoding is None:
                self._decoding = self._proven()
            found = _graph_of(self._decoding, self._model, like.new_empty(0))
            self._graphs[like.device, like.dtype] = found
        return found

    def _proven(self) -> Decoding:
        """The bundle's constants. Raises InvalidInputError where it has none, SelfTestError where they are wrong."""
        bundle = open_bundle(self._engines.path)
        check_fingerprint(bundle.manifest.fingerprint, self._engines.fingerprint)
        if DECODING_NAME not in bundle.manifest.files:
            raise InvalidInputError(
                f"{self._engines.path} was built before gradients went through a bundle: it has no {DECODING_NAME}; "
                f"build it again with {quoted('build')}, its fingerprint stays the same"
            )
        decoding = read_decoding(bundle.content(DECODING_NAME), self._model)
        beliefs = read_golden(bundle.content(GOLDEN_NAME), self._model).beliefs
        if beliefs is None:
            raise BundleError(f"{self._engines.path} has {DECODING_NAME}, and no golden beliefs to hold it against")
        if problems := problems_of(decoding, beliefs, self._model):
            raise SelfTestError(f"{'; '.join(problems)}: build the bundle again with {quoted('build')}")
        return decoding


def problems_of(decoding: Decoding, beliefs: GoldenBeliefs, model: ChunkModel | StepModel) -> list[str]:
    """Where these constants do not give the definition's answers."""
    problems = []
    graph = _graph_of(decoding, model, torch.empty(0, dtype=torch.float64))
    for case in beliefs.cases(model):
        given = tuple(torch.tensor(part, dtype=torch.float64) for part in case.given)
        mode: BeliefMode = "likeliest mode" if case.keeps_mode else "expected"
        with torch.no_grad():
            found = graph.decode(given, None, mode, None, is_logits=True)
        errors = (
            action_errors(case.actions, found.actions.numpy(), model.action_units).value,
            std_error(case.std, found.std.numpy(), model.action_units),
        )
        if not (errors[0] <= GATES.action_error and errors[1] <= GATES.std_error):
            problems.append(
                f"beliefs that {DECODING_NAME} decodes are off by {errors[0]:.3g} units, and their deviations by "
                f"{errors[1]:.3g} of themselves ({case.prefix} {model.depth_unit}, {mode}); at most "
                f"{GATES.action_error:g} and {GATES.std_error:g} may be"
            )
    return problems


def _graph_of(decoding: Decoding, model: ChunkModel | StepModel, like: Tensor) -> _Graph:
    if isinstance(decoding, ChunkDecoding):
        return ChunkBeliefs.of(decoding, cast(ChunkModel, model), like)
    return StepBeliefs.of(decoding, model.action_offset, coarse_layers(model), like)


def _floats(name: str, value: object) -> Tensor:
    """A tensor of floats. Raises InvalidInputError for anything else."""
    # Those that are recorded have no numbers yet, and take part in the graph.
    found = value if isinstance(value, Tensor) and not runs_on_numbers() else checked_tensor(name, value)
    if found.dtype not in _TYPES:
        raise InvalidInputError(f"{name} have type {found.dtype}; expected floats of 16, 32 or 64 bits")
    return found


def _pair(classes: Tensor, bits: Tensor, model: ChunkModel) -> tuple[tuple[Tensor, ...], torch.Size]:
    if not classes.ndim or classes.shape[-1] != model.num_classes:
        raise InvalidInputError(
            f"classes have shape {[*classes.shape]}; expected [..., C] = [..., {model.num_classes}], the escape class "
            "last"
        )
    leading = classes.shape[:-1]
    if not bits.ndim or bits.shape[:-1] != leading or bits.device != classes.device:
        raise InvalidInputError(
            f"bits have shape {[*bits.shape]} on {bits.device}; expected {[*leading, 'n']} on {classes.device}, beside "
            f"classes of shape {[*classes.shape]}"
        )
    check_num_bits(tuple(bits.shape), model)
    count = math.prod(leading)
    return (classes.reshape(count, model.num_classes), bits.reshape(count, bits.shape[-1])), leading


def _arrays(given: tuple[Tensor, ...]) -> Given:
    """Their numbers, in a type that numpy has."""
    parts = (part.detach().resolve_neg() for part in given)
    narrow = (torch.float16, torch.bfloat16)
    arrays = ((part.float() if part.dtype in narrow else part).numpy() for part in parts)
    return cast(Given, tuple(arrays))


def _sharpness(temperature: object, given: tuple[Tensor, ...], validator: BeliefValidator) -> Tensor | None:
    """1 / temperature of each layer, token, or class and bit; None for 1. A tensor may carry a gradient."""
    if type(temperature) is float and temperature == 1:
        return None
    size = given[0].shape[-2] if len(given) == 1 else 1 + given[1].shape[1]
    if torch.compiler.is_compiling():
        # Numpy's own code cannot be compiled; its numbers can.
        temperature = torch.as_tensor(temperature, dtype=given[0].dtype, device=given[0].device)
    if not isinstance(temperature, Tensor):
        # Of the arrays it takes their shapes alone.
        found = validator.sharpness(temperature, cast(Given, given))
        if isinstance(temperature, int | float):
            # Filled, where a copy would wait for the GPU.
            return given[0].new_full((size,), float(found[0]))
        return tensor_of(found, given[0])
    if tuple(temperature.shape) not in ((), (size,)) or not temperature.is_floating_point():
        raise InvalidInputError(
            f"temperature has shape {[*temperature.shape]} and type {temperature.dtype}; expected floats, one or "
            f"[{size}]"
        )
    if temperature.is_cpu and runs_on_numbers():
        validator.sharpness(temperature.detach().double().numpy(), cast(Given, given))
    # Of a temperature that is none nothing follows.
    temperature = torch.where(temperature > 0, temperature, torch.nan)
    return (1 / temperature.to(given[0])).expand(size)


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Products of half the digits would be off by more than what a policy is trained to."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
