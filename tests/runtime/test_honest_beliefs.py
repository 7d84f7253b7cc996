"""Settings that were fitted to a policy: one call decodes with them, and refuses those of anything else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rfsq.runtime import ActionTokenizer, BeliefSettings, InvalidInputError
from rfsq.runtime.bundle.beliefs import BeliefKind
from rfsq.runtime.bundle.errors import FingerprintError

STEPS, WORDS, PAIR = "per-step tokens", "chunk tokens", "classes and bits"


class Case:
    """A tokenizer, what a policy says of five chunks, and settings that hold for it."""

    def __init__(self, tokenizer: ActionTokenizer, given: Any, kind: BeliefKind, temperature: Any) -> None:
        self.tokenizer, self.given = tokenizer, given
        scales = dict.fromkeys(("expected", "likeliest mode"), (0.5, 2.0, 3.0))
        self.settings = BeliefSettings(kind, tuple(temperature), scales)

    def outputs(self) -> tuple[Any, Any, Any]:
        actions, std = (np.zeros(self.tokenizer.model.actions_shape(5), np.float32) for _ in range(2))
        return actions, std, np.zeros(5, np.float32)


@pytest.fixture(params=[STEPS, WORDS, PAIR])
def case(request: pytest.FixtureRequest, bundle: Path, chunk_bundle: Path) -> Iterator[Case]:
    random = np.random.default_rng(0)

    def logits(*shape: int) -> Any:
        return random.standard_normal((5, *shape)).astype(np.float32)

    is_step = request.param == STEPS
    with ActionTokenizer.load(bundle if is_step else chunk_bundle, backend="onnxruntime") as tokenizer:
        identity = tokenizer.fingerprint
        if is_step:
            yield Case(tokenizer, logits(2, 4, 3, 5), BeliefKind(identity, "tokens", 3, 2), (0.5, 1.5, 2.5))
        elif request.param == WORDS:
            yield Case(tokenizer, logits(2, 256), BeliefKind(identity, "tokens", 2, 0), (0.5, 2.0))
        else:
            kind = BeliefKind(identity, "classes and bits", 2, 0)
            yield Case(tokenizer, (logits(6), logits(13)), kind, np.linspace(0.5, 2, 14))


@pytest.mark.parametrize("mode", ["expected", "likeliest mode"])
def test_settings_are_their_temperatures_and_their_scales(case: Case, mode: Any) -> None:
    decode, settings = case.tokenizer.decode_logits, case.settings
    expected = decode(case.given, mode=mode, temperature=settings.temperature)
    found = decode(case.given, mode=mode, settings=settings)
    np.testing.assert_array_equal(found.actions, expected.actions)
    np.testing.assert_array_equal(found.std, expected.std * np.array([0.5, 2, 3], np.float32))
    np.testing.assert_array_equal(found.mode_probability, expected.mode_probability)
    np.testing.assert_array_equal(found.mode, expected.mode)


def test_they_are_of_probabilities_as_well(case: Case) -> None:
    if isinstance(case.given, tuple):
        classes, bits = np.exp(case.given[0].astype(np.float64)), 1 / (1 + np.exp(-case.given[1].astype(np.float64)))
        shares: Any = (classes / classes.sum(-1, keepdims=True)).astype(np.float32), bits.astype(np.float32)
    else:
        powers = np.exp(case.given.astype(np.float64))
        shares = (powers / powers.sum(-1, keepdims=True)).astype(np.float32)
    expected = case.tokenizer.decode_logits(case.given, settings=case.settings)
    found = case.tokenizer.decode_probabilities(shares, settings=case.settings)
    np.testing.assert_allclose(found.std, expected.std, rtol=1e-3)
    np.testing.assert_allclose(found.actions, expected.actions, atol=1e-5)


def test_arrays_that_come_again_are_scaled_as_they_were_asked_for(case: Case) -> None:
    into, scale = case.tokenizer.decode_logits_into, np.array([0.5, 2, 3], np.float32)
    actions, std, sure = case.outputs()
    warm = case.tokenizer.decode_logits(case.given, temperature=case.settings.temperature)
    plain = case.tokenizer.decode_logits(case.given)
    for settings in (case.settings, None, case.settings, case.settings, replace(case.settings), None, None):
        expected = plain if settings is None else warm
        into(case.given, actions, std, sure, settings=settings)
        np.testing.assert_array_equal(actions, expected.actions)
        np.testing.assert_array_equal(std, expected.std * (1 if settings is None else scale))


def test_settings_of_another_tokenizer_are_refused_and_nothing_is_written(case: Case) -> None:
    other = replace(case.settings, kind=replace(case.settings.kind, fingerprint="0" * 64))
    outputs = case.outputs()
    with pytest.raises(FingerprintError, match="of the tokenizer 0000000000000000, and this one is"):
        case.tokenizer.decode_logits(case.given, settings=other)
    with pytest.raises(FingerprintError, match="of the tokenizer 0000000000000000, and this one is"):
        case.tokenizer.decode_logits_into(case.given, *outputs, settings=other)
    # Not even where the arrays are known.
    case.tokenizer.decode_logits_into(case.given, *outputs, settings=case.settings)
    case.tokenizer.decode_logits_into(case.given, *outputs, settings=case.settings)
    before = outputs[0].copy()
    with pytest.raises(FingerprintError, match="of the tokenizer 0000000000000000, and this one is"):
        case.tokenizer.decode_logits_into(case.given, *outputs, settings=other)
    np.testing.assert_array_equal(outputs[0], before)


def test_settings_of_another_form_or_length_or_mode_are_refused(case: Case) -> None:
    settings, decode = case.settings, case.tokenizer.decode_logits
    form: Any = "tokens" if settings.kind.form == "classes and bits" else "classes and bits"
    for kind in (
        replace(settings.kind, length=5),
        replace(settings.kind, form=form),
        replace(settings.kind, coarse=1),
    ):
        with pytest.raises(InvalidInputError, match=r"were fitted to .*; what is decoded is .*: fit them again"):
            decode(case.given, settings=replace(settings, kind=kind))
    with pytest.raises(InvalidInputError, match="0 scales of std for 'sample'; expected 3"):
        decode(case.given, mode="sample", settings=settings)
    with pytest.raises(InvalidInputError, match="0 scales of std for 'expected'; expected 3"):
        decode(case.given, settings=replace(settings, std_scale={}))
    with pytest.raises(InvalidInputError, match="2 scales of std for 'expected'; expected 3"):
        decode(case.given, settings=replace(settings, std_scale={"expected": (1.0, 1.0)}))
    with pytest.raises(InvalidInputError, match="temperature has shape"):
        decode(case.given, settings=replace(settings, temperature=(1.0,) * 3 + settings.temperature))


def test_what_nobody_wants_needs_no_scale(case: Case) -> None:
    actions, _, _ = case.outputs()
    settings = replace(case.settings, std_scale={})
    case.tokenizer.decode_logits_into(case.given, actions, settings=settings)
    expected = case.tokenizer.decode_logits(case.given, temperature=settings.temperature).actions
    np.testing.assert_array_equal(actions, expected)


def test_a_temperature_beside_settings_and_what_are_no_settings_are_refused(case: Case) -> None:
    decode = case.tokenizer.decode_logits
    for temperature in (2.0, 1, [1.0], np.ones(3), None, case.settings.temperature):
        with pytest.raises(InvalidInputError, match=r"settings and a temperature, .*, were given; expected one"):
            decode(case.given, settings=case.settings, temperature=temperature)
    for wrong in ("beliefs.json", {}, case.settings.temperature, case.settings.kind, BeliefSettings, 1.0, False):
        with pytest.raises(InvalidInputError, match="expected BeliefSettings, as load_belief_settings gives them"):
            decode(case.given, settings=wrong)
        with pytest.raises(InvalidInputError, match="expected BeliefSettings, as load_belief_settings gives them"):
            case.tokenizer.decode_logits_into(case.given, *case.outputs(), settings=wrong)


class OnGpu:
    """What says that it lies on a GPU."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (1, 2, 4, 3, 5), "typestr": "<f4", "data": (0, False), "version": 3}


def test_arrays_of_the_gpu_are_scaled_by_nobody_and_refused(case: Case) -> None:
    for given in (OnGpu(), (OnGpu(), OnGpu())):
        with pytest.raises(InvalidInputError, match=r"the arrays lie on the GPU; .*: pass temperature=settings.temp"):
            case.tokenizer.decode_logits(given, settings=case.settings)
        with pytest.raises(InvalidInputError, match=r"the arrays lie on the GPU; .*: pass temperature=settings.temp"):
            case.tokenizer.decode_logits_into(given, *case.outputs(), settings=case.settings)
