"""Beliefs in a control loop: what came in place of tokens, what it decodes to, and whether that is sure enough."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from ..backends.beliefs import belief_backend, coarse_layers, mode_shape
from ..bundle.arrays import Float32Array, Int32Array
from ..bundle.belief_validation import BeliefValidator
from ..bundle.comparison import action_errors, std_error
from ..bundle.errors import FingerprintError, InvalidInputError
from ..bundle.gates import GATES
from ..bundle.models import ChunkModel, ModelEntry
from ..bundle.paths import counted
from ..tokenizer import ActionTokenizer
from .belief_config import BeliefConfig
from .config import ControlConfig
from .errors import ControlConfigError
from .result import TickBelief

# Bound names and positional `out`, as in the guard.
_less_equal, _lowest, _highest = np.less_equal, np.minimum.reduce, np.maximum.reduce
_Array = np.ndarray
_FLOAT32 = np.dtype(np.float32)
_LARGEST = float(np.finfo(np.float32).max)
#: A probability may be rounded a little above 1.
_MOST = 1.001
#: The shape of distributions, or of classes and bits.
_Shapes = tuple[tuple[int, ...], ...]


@dataclass(slots=True, eq=False)
class GivenBelief:
    """What came on a tick, where it was not tokens alone; and what becomes of it.

    layers: how many, or how many chunk tokens, once its form is found legal. decoded: what it decodes to, once it does.
    """

    tokens: object
    logits: object
    probabilities: object
    layers: int = 0
    decoded: BeliefSlots | None = None

    @property
    def is_logits(self) -> bool:
        return self.probabilities is None

    @property
    def value(self) -> Any:
        return self.logits if self.probabilities is None else self.probabilities

    @property
    def parts(self) -> tuple[Any, ...]:
        """The arrays of a pair, or one alone; whatever it is, not looked at yet."""
        value = self.value
        return value if isinstance(value, tuple) else (value,)


class BeliefForms:
    """Which forms of beliefs a loop takes: one chunk of float32, of as many layers as decode, and as temperatures or
    settings are for."""

    def __init__(self, model: ModelEntry, config: BeliefConfig) -> None:
        self._model, self._validator = model, BeliefValidator(model)
        #: Legal ones, with the number of layers or tokens; and what they are, in words.
        self.layers_of = {shapes: layers for shapes, layers, size in forms_of(model) if _is_for(config, shapes, size)}
        self.longest = max(self.layers_of, key=self.layers_of.__getitem__, default=())
        self._expected = "temperatures" if config.settings is None else f"settings: {config.settings.kind}"

    def accept(self, given: GivenBelief) -> int:
        """How many layers, or chunk tokens, what is given has; 0 where the loop does not take it by its form."""
        if given.tokens is not None or (given.logits is not None and given.probabilities is not None):
            return 0
        parts = given.parts
        if parts is given.value and len(parts) != 2:
            return 0
        for part in parts:
            if type(part) is not _Array or part.dtype != _FLOAT32:
                return 0
        given.layers = layers = self.layers_of.get(tuple([part.shape for part in parts]), 0)
        return layers

    def wrong_form(self, given: GivenBelief) -> str:
        """What is wrong with the form of what was given; empty for nothing."""
        named = {"tokens": given.tokens, "logits": given.logits, "probabilities": given.probabilities}
        names = [name for name, value in named.items() if value is not None]
        if len(names) != 1:
            return f"{' and '.join(names)} were given on one tick; expected one of them: send what the policy gives"
        if given.layers:
            return ""
        try:
            found = self._validator.given(given.value, is_logits=given.is_logits, unchecked=sys.maxsize)
        except InvalidInputError as error:
            return str(error)
        shapes = " and ".join(str(list(part.shape)) for part in found)
        if len(found[0]) != 1:
            return (
                f"{names[0]} have shape {shapes}, of {len(found[0])} chunks; expected one chunk: pass the first alone"
            )
        if tuple(part.shape for part in found) in self.layers_of:
            return f"{names[0]} are in another byte order; expected float32 of this machine: convert them"
        return (
            f"{names[0]} have shape {shapes}; expected what the {self._expected} are for: send that, or calibrate for "
            "this"
        )


def _is_for(config: BeliefConfig, shapes: _Shapes, size: int) -> bool:
    """Whether this form, of so many layers, tokens, or class and bits, is what temperatures or settings are for."""
    numbers = config.temperature if config.settings is None else config.settings.temperature
    is_pair = config.settings is not None and config.settings.kind.form == "classes and bits"
    is_form = config.settings is None or is_pair is (len(shapes) == 2)
    return is_form and (not isinstance(numbers, tuple) or len(numbers) == size)


def forms_of(model: ModelEntry) -> Iterator[tuple[_Shapes, int, int]]:
    """Of every form in which one chunk can be given: its shapes, how many layers or tokens, how many temperatures."""
    for prefix in model.prefixes:
        yield ((1, *model.token_grid, prefix, model.vocabulary),), prefix, prefix
        if isinstance(model, ChunkModel):
            bits = prefix * model.token_bits - model.class_bits
            yield ((1, model.num_classes), (1, bits)), prefix, 1 + bits


class BeliefSlots:
    """Arrays of one tokenizer in a loop: what comes is copied into them, and what it decodes to is left there.

    A policy sends other arrays each time; those of a tokenizer that come again are checked faster. actions: to be
    written into, float32 [1, T, A].
    """

    #: The own arrays that were copied into last.
    _given: Any
    _is_logits: bool

    def __init__(self, tokenizer: ActionTokenizer, config: BeliefConfig, actions: Float32Array) -> None:
        model = tokenizer.model
        self._mode, self._temperature, self._settings = config.mode, config.temperature, config.settings
        self._decoders = tokenizer.decode_probabilities_into, tokenizer.decode_logits_into
        self.actions, self.std = actions, np.zeros_like(actions)
        self.mode_probability = np.zeros(1, np.float32)
        self.mode = np.zeros(mode_shape(model, 1), np.int32)
        #: What it decodes to, by the names of a flight record.
        self.answers = {
            "chunks": self.actions, "std": self.std, "mode_probability": self.mode_probability, "mode": self.mode,
        }  # fmt: skip
        self._own = _views({shapes for shapes, *_ in forms_of(model)})
        #: Logits that decode, of what nobody is sure of.
        self.probe = _probe(BeliefForms(model, config).longest)

    def take(self, given: GivenBelief) -> None:
        """Copy what came, of a legal form; a backend that leaves a part unwritten must not pass off the last answer."""
        parts = given.parts
        own = self._own[tuple([part.shape for part in parts])]
        for mine, part in zip(own, parts, strict=True):
            mine[...] = part
        self._given, self._is_logits = own if len(own) > 1 else own[0], given.is_logits
        self.std.fill(np.nan)
        self.mode_probability.fill(np.nan)

    def decode(self) -> None:
        """Decode what was taken. Raises whatever the tokenizer raises."""
        self._decoders[self._is_logits](
            self._given,
            self.actions,
            self.std,
            self.mode_probability,
            self.mode,
            mode=self._mode,
            temperature=self._temperature,
            settings=self._settings,
        )

    @property
    def is_finite(self) -> bool:
        """Whether `std` and the mode's probability are such."""
        # A NaN is the extreme of any array that holds one, and no comparison with it is true.
        std = self.std
        return bool(
            _lowest(std, None) >= 0 and _highest(std, None) <= _LARGEST and 0 <= self.mode_probability[0] <= _MOST
        )


def _probe(shapes: _Shapes) -> GivenBelief:
    random = np.random.default_rng(0)
    parts = tuple(random.standard_normal(shape, np.float32) for shape in shapes)
    return GivenBelief(None, parts if len(parts) > 1 else parts[0], None)


class BeliefTrial:
    """Whether a backend that has failed decodes beliefs as it did at the start; for a thread beside the loop."""

    def __init__(self, tokenizer: ActionTokenizer, config: BeliefConfig) -> None:
        model = tokenizer.model
        self._units = model.action_units
        self._slots = BeliefSlots(tokenizer, config, np.zeros(model.actions_shape(1), np.float32))
        self._actions, self._std = (answer.astype(np.float64) for answer in self._answer())

    def repeats(self) -> bool:
        """Raises whatever the tokenizer raises."""
        actions, std = self._answer()
        return (
            action_errors(self._actions, actions, self._units).value <= GATES.action_error
            and std_error(self._std, std, self._units) <= GATES.std_error
        )

    def _answer(self) -> tuple[Float32Array, Float32Array]:
        self._slots.take(self._slots.probe)
        self._slots.decode()
        return self._slots.actions, self._slots.std


def _views(forms: set[_Shapes]) -> dict[_Shapes, tuple[Float32Array, ...]]:
    """Arrays of these shapes, all in the same memory: one form comes at a time."""
    memory = [
        np.zeros(max(math.prod(shapes[place]) for shapes in forms if len(shapes) > place), np.float32)
        for place in range(max(map(len, forms)))
    ]
    return {
        shapes: tuple(flat[: math.prod(shape)].reshape(shape) for flat, shape in zip(memory, shapes, strict=False))
        for shapes in forms
    }


class BeliefJudge:
    """Whether the actions of the chunk in service are sure enough. For one thread."""

    #: Whether the chunk in service came as a belief: tokens do not say how sure they are. And what it says.
    has_belief: bool
    _mode: Int32Array
    _probability: float

    def __init__(self, config: ControlConfig, beliefs: BeliefConfig, model: ModelEntry) -> None:
        self._std = np.zeros((model.chunk_length, model.action_dim), np.float32)
        limits = np.full(self._std.shape, beliefs.std_limit)
        # It is held at one value, whatever is believed.
        limits[:, config.locked] = np.inf
        with np.errstate(over="ignore"):
            # What is too large for float32 is infinite.
            self._limit, self._leave = (part.astype(np.float32) for part in (limits, limits * beliefs.leave_factor))
        self._least = beliefs.least_mode_probability
        self._least_to_leave = 1 - (1 - self._least) * beliefs.leave_factor if self._least else 0.0
        self._leave_ticks = beliefs.leave_ticks
        # Results of comparisons, compared as bytes.
        self._within = bytearray(self._std.size)
        self._is_within = np.frombuffer(self._within, np.bool_).reshape(self._std.shape)
        self._all_within = b"\1" * self._std.size
        self._all, self._none = [True] * len(self._std), [False] * len(self._std)
        #: Of every row: whether it does not become uncertain, and whether it ends being so.
        self._is_sure = self._is_surer = self._none

    def take_in(self, decoded: BeliefSlots | None) -> None:
        """Of the chunk that is in service from now on; None for one that came as tokens."""
        self.has_belief = False
        if decoded is None:
            return
        self._std[...] = decoded.std[0]
        # An array of its own for each chunk: results refer to it.
        self._mode, self._probability = decoded.mode[0].copy(), float(decoded.mode_probability[0])
        # Where a number is NaN, nothing is sure.
        self._is_sure = self._rows_within(self._limit, self._least)
        self._is_surer = self._rows_within(self._leave, self._least_to_leave)
        self.has_belief = True

    def _rows_within(self, limit: Float32Array, least: float) -> list[bool]:
        if not self._probability >= least:
            return self._none
        _less_equal(self._std, limit, self._is_within)
        if self._within == self._all_within:
            return self._all
        return cast(list[bool], self._is_within.all(axis=1).tolist())

    def believed(self, row: int) -> TickBelief:
        """Of this row of the chunk."""
        return TickBelief(self._std[row].copy(), self._probability, self._mode)

    def doubt_after(self, doubt: int, row: int) -> int:
        """How many ticks have to be sure in a row from now on until nothing is uncertain any more, 0 for none; doubt:
        the same before this tick, on which this row is served."""
        if not doubt:
            return 0 if self._is_sure[row] else self._leave_ticks
        return doubt - 1 if self._is_surer[row] else self._leave_ticks

    def why(self, row: int) -> str:
        """Why an action of this row is uncertain, in words."""
        if self._is_sure[row]:
            return "it was uncertain before, and is not yet sure enough (leave_factor, leave_ticks)"
        if not self._probability >= self._least:
            return (
                f"the likeliest mode has a probability of {self._probability:.3g}; expected at least {self._least:g} "
                "(least_mode_probability): look at the policy, or at what it sees"
            )
        index = int((self._std[row] <= self._limit[row]).argmin())
        return (
            f"std of dimension {index} is {self._std[row, index]:.3g}; expected at most {self._limit[row, index]:.3g} "
            "(std_limit): look at the policy, or at what it sees"
        )


def _check_limits(beliefs: BeliefConfig, model: ModelEntry) -> None:
    """Raises InvalidInputError for a limit that would hold whatever a policy says."""
    has_limit = np.isfinite(beliefs.std_limit).any()
    if has_limit and model.token_grid and beliefs.mode == "likeliest mode" and not beliefs.least_mode_probability:
        layers = counted(coarse_layers(model), "layer")
        raise InvalidInputError(
            f"std_limit is set, and the likeliest mode takes the likeliest tokens of {layers} for certain: whatever "
            "the policy says of these, std is 0; take mode 'expected', or set least_mode_probability, too"
        )


def check_beliefs(config: ControlConfig, tokenizers: Sequence[ActionTokenizer]) -> None:
    """Raises ControlConfigError unless all of these can decode beliefs as the settings want it."""
    beliefs = config.beliefs
    if beliefs is None:
        return
    try:
        for tokenizer in tokenizers:
            forms = BeliefForms(tokenizer.model, beliefs)
            belief_backend(tokenizer.backend)
            _check_limits(beliefs, tokenizer.model)
            if (settings := beliefs.settings) is not None:
                coarse = coarse_layers(tokenizer.model)
                settings.check(replace(settings.kind, fingerprint=tokenizer.fingerprint, coarse=coarse))
    except (InvalidInputError, FingerprintError) as error:
        raise ControlConfigError(f"the settings have beliefs, and they cannot be decoded: {error}") from error
    if not forms.layers_of:
        raise ControlConfigError(
            "beliefs have as many temperatures as no form of them needs; expected one for each layer, token, or class "
            "and bit that this bundle decodes: calibrate for this tokenizer"
        )
