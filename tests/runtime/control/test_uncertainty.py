"""Beliefs in the loop: how logits and probabilities are taken, how sure they have to be, and what is done else."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from rfsq.runtime import (
    ActionTokenizer,
    BeliefConfig,
    BeliefSettings,
    ControlConfig,
    ControlConfigError,
    ControlFaultError,
    Status,
)
from rfsq.runtime.backends.beliefs import BeliefAnswer, BeliefQuestion
from rfsq.runtime.bundle.beliefs import BeliefKind
from rfsq.runtime.control.worker import WarmTokenizer
from rfsq.runtime.qualification.soak import chunks_of
from tests.chunk_bundles import SMALL, ChunkRecipe
from tests.runtime.control.loops import Clock, ScriptedLoop, fails, first_of, loop, switched


class Pair(NamedTuple):
    classes: Any
    bits: Any


RAMP = [[0.1], [0.2], [0.3], [0.4]]
VALUES: dict[str, Any] = {
    "period_s": 0.05,
    "action_low": [-1.0, -2.0],
    "action_high": [1.0, 2.0],
    "max_relative_step": [0.5, float("inf")],
    "action_kind": ["delta", "absolute"],
}
SETTINGS = BeliefSettings(BeliefKind("0" * 64, "tokens", 3, 2), (1.5, 2.0, 2.5), {"expected": (0.5, 2.0)})
#: Served, uncertain in each of the three ways.
ACTIONS_ON_DOUBT = pytest.mark.parametrize("when_uncertain", ["hold", "slow", "ask"])


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_come_back_from_json_as_they_went() -> None:
    beliefs = BeliefConfig("likeliest mode", std_limit=np.array([0.1, np.inf]), when_uncertain="slow")  # type: ignore[arg-type]
    for given in (beliefs, BeliefConfig(settings=SETTINGS), BeliefConfig(temperature=(2, 3))):
        config = ControlConfig(**VALUES, beliefs=given)
        assert ControlConfig.from_values(json.loads(json.dumps(config.to_values()))) == config
        assert copy.deepcopy(config) == config
    assert beliefs.std_limit == (0.1, np.inf)
    assert "beliefs" not in ControlConfig(**VALUES).to_values()


def test_a_file_of_settings_names_that_of_beliefs_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    other = replace(SETTINGS, temperature=tuple(2 * value for value in SETTINGS.temperature))
    (tmp_path / "elsewhere" / "beliefs.json").write_text(other.text(), encoding="utf-8")
    monkeypatch.chdir(tmp_path / "elsewhere")
    text = "\n".join(f"{name} = {value}" for name, value in VALUES.items())
    (tmp_path / "beliefs.json").write_text(SETTINGS.text(), encoding="utf-8")
    (tmp_path / "robot.toml").write_text(
        f"{text}\n[beliefs]\nleast_mode_probability = 0.5\nsettings = 'beliefs.json'\n", encoding="utf-8"
    )
    config = ControlConfig.from_toml(tmp_path / "robot.toml")
    assert config.beliefs == BeliefConfig(least_mode_probability=0.5, settings=SETTINGS)
    (tmp_path / "beliefs.json").unlink()
    with pytest.raises(ControlConfigError, match=r"robot.toml: beliefs.settings: .*beliefs.json holds no settings"):
        ControlConfig.from_toml(tmp_path / "robot.toml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"std_limit": 0.0}, "std_limit is 0.0; expected above 0"),
        ({"std_limit": float("nan")}, "std_limit is nan; expected above 0"),
        ({"std_limit": ()}, r"std_limit is \(\); expected above 0"),
        ({"std_limit": (0.1,)}, "beliefs.std_limit has 1 values and action_low 2"),
        ({"std_limit": "0.1"}, "std_limit is '0.1'; expected a list or a number"),
        ({"std_limit": True}, "std_limit is True; expected"),
        ({"least_mode_probability": 1.01}, "least_mode_probability is 1.01; expected from 0"),
        ({"least_mode_probability": None}, "least_mode_probability is None; expected a number"),
        ({"slow_factor": 0.0}, "slow_factor is 0.0; expected more than 0, at most 1"),
        ({"leave_factor": 1.5}, "leave_factor is 1.5; expected more than 0, at most 1"),
        ({"leave_ticks": 0}, "leave_ticks is 0; expected an integer from 1"),
        ({"leave_ticks": 1.5}, "leave_ticks is 1.5; expected an integer"),
        ({"mode": "sample"}, "mode is 'sample'; expected one of expected, likeliest mode"),
        ({"when_uncertain": "stop"}, "when_uncertain is 'stop'; expected one of hold, slow, ask"),
        ({"temperature": 0}, "temperature is 0.0; expected from 1e-12"),
        ({"temperature": (1.0, -1.0)}, "temperature is .*; expected from 1e-12"),
        ({"settings": "beliefs.json"}, "settings is 'beliefs.json'; expected an object"),
        ({"settings": SETTINGS, "temperature": 2.0}, "both temperature and settings are given"),
        (
            {"settings": SETTINGS, "mode": "likeliest mode"},
            "beliefs.settings: .* 0 scales of std for 'likeliest mode'; expected 2",
        ),
        ({"settings": replace(SETTINGS, std_scale={"expected": (1.0,)})}, "beliefs.settings: .* 1 scales of std"),
    ],
)
def test_what_no_setting_can_be_is_refused_from_python_and_from_a_table(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ControlConfigError, match=message):
        ControlConfig(**VALUES, beliefs=BeliefConfig(**change))
    with pytest.raises(ControlConfigError, match=message):
        ControlConfig.from_values({**VALUES, "beliefs": change})


@pytest.mark.parametrize(
    ("beliefs", "message"),
    [(0.5, "beliefs is 0.5; expected"), ({"std": 1}, "unknown keys .*'std'"), (SETTINGS, "beliefs is .*; expected")],
)
def test_what_are_no_settings_of_beliefs_is_refused(beliefs: Any, message: str) -> None:
    with pytest.raises(ControlConfigError, match=message):
        ControlConfig(**VALUES, beliefs=beliefs)


# --- when the decoder is made -----------------------------------------------------------------------------------------


class Plain:
    """A backend that decodes tokens alone."""

    checked_steps = 0

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)


def test_a_backend_without_beliefs_is_refused_as_the_first_and_as_a_fallback(tokenizer: ActionTokenizer) -> None:
    plain = ActionTokenizer(tokenizer.manifest, Plain(tokenizer.backend), tokenizer.golden)  # type: ignore[arg-type]
    for first, fallbacks in ((plain, ()), (tokenizer, (plain,))):
        with pytest.raises(ControlConfigError, match=r"^the settings have beliefs, .* decodes no probabilities"):
            loop(first, fallbacks=fallbacks, beliefs=BeliefConfig())
        loop(first, fallbacks=fallbacks)


def test_a_bundle_whose_tokens_no_policy_can_believe_is_refused(dynamic_tokenizer: ActionTokenizer) -> None:
    with pytest.raises(ControlConfigError, match="a 'dynamic' bundle need the mean and sigma"):
        loop(dynamic_tokenizer, beliefs=BeliefConfig())


def test_temperatures_of_another_number_of_layers_or_tokens_are_refused(either_tokenizer: ActionTokenizer) -> None:
    with pytest.raises(ControlConfigError, match="expected one for each layer, token, or class and bit"):
        loop(either_tokenizer, beliefs=BeliefConfig(temperature=(1.0,) * 99))


def test_a_limit_that_holds_whatever_comes_is_refused(
    tokenizer: ActionTokenizer, chunk_tokenizer: ActionTokenizer
) -> None:
    blind = BeliefConfig("likeliest mode", std_limit=0.1)
    with pytest.raises(ControlConfigError, match="std is 0; take mode 'expected', or set least_mode_probability, too"):
        loop(tokenizer, beliefs=blind)
    for found, beliefs in (
        (chunk_tokenizer, blind),
        (tokenizer, replace(blind, mode="expected")),
        (tokenizer, replace(blind, least_mode_probability=0.2)),
    ):
        loop(found, beliefs=beliefs).close()


# --- what comes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_worker", [False, True])
def test_what_is_certain_is_served_as_its_tokens_are(either_tokenizer: ActionTokenizer, use_worker: bool) -> None:
    model, (tokens, _, _) = either_tokenizer.model, chunks_of(either_tokenizer, 16)
    changes = {"use_worker": use_worker, "deadline_us": 1e9 if use_worker else None}
    beliefs = BeliefConfig(std_limit=1e-3, least_mode_probability=0.99)
    with loop(either_tokenizer, beliefs=beliefs, max_relative_step=(np.inf,) * model.action_dim, **changes) as decoder:
        decoder.warmup()
        for number, chunk in enumerate(tokens):
            one_hot = (np.arange(model.vocabulary) == chunk[..., None]).astype(np.float32)
            given: dict[str, Any] = {"probabilities": one_hot}
            if number % 2:
                given = {"logits": np.where(one_hot > 0, np.float32(3), np.float32(-np.inf))}
            result = decoder.step(**given)
            assert (result.status, result.belief is not None) == (Status.OK, True), result.detail
            served = result.actions
            np.testing.assert_array_equal(served, decoder.step(chunk).actions)
            assert decoder.result.belief is None


@pytest.mark.parametrize("use_worker", [False, True])
def test_a_pair_of_classes_and_bits_is_served(chunk_tokenizer: ActionTokenizer, use_worker: bool) -> None:
    model: Any = chunk_tokenizer.model
    changes = {"use_worker": use_worker, "deadline_us": 1e9 if use_worker else None}
    random = np.random.default_rng(0)
    with loop(
        chunk_tokenizer, beliefs=BeliefConfig(), max_relative_step=(np.inf,) * model.action_dim, **changes
    ) as decoder:
        decoder.warmup()
        for count in (1, model.num_tokens):
            bits = count * model.token_bits - model.class_bits
            pair = tuple(random.normal(size=(1, size)).astype(np.float32) for size in (model.num_classes, bits))
            expected = chunk_tokenizer.decode_logits(pair)
            # A named one as well.
            result = decoder.step(logits=Pair(*pair) if count > 1 else pair, sequence=count)
            assert result.status is Status.OK
            assert result.belief is not None
            np.testing.assert_array_equal(result.actions, expected.actions[0, 0])
            np.testing.assert_array_equal(result.belief.std, expected.std[0, 0])
            assert result.belief.mode_probability == expected.mode_probability[0]
            assert result.belief.mode == expected.mode[0]


def test_a_loop_that_takes_tokens_alone_says_so() -> None:
    with ScriptedLoop() as made:
        result = made.tick(0.5, std=0.0)
        assert (result.status, result.is_held) == (Status.BAD_TOKEN, True)
        assert result.detail == (
            "logits or probabilities were given; expected tokens: set beliefs in the settings to take both"
        )
        assert made.tick(0.5).status is Status.OK


WRONG_FORMS: list[tuple[Callable[[Any], dict[str, Any]], str]] = [
    (lambda logits: {"logits": logits[0]}, r"for a single chunk pass logits\[None\]"),
    (lambda logits: {"logits": np.concatenate((logits, logits))}, "of 2 chunks; expected one chunk"),
    (lambda logits: {"logits": logits[:0]}, "of 0 chunks; expected one chunk"),
    (lambda logits: {"logits": logits[..., 1:]}, "expected "),
    (lambda logits: {"logits": logits[..., :0, :]}, "of l = 0"),
    (lambda logits: {"logits": logits.astype(np.float64)}, r"convert with logits.astype\(np.float32\)"),
    (lambda logits: {"logits": logits.astype(np.float16)}, r"convert with logits.astype\(np.float32\)"),
    (lambda logits: {"logits": logits.astype(">f4")}, "in another byte order"),
    (lambda logits: {"logits": logits.tolist()}, "are a list|is a builtins.list"),
    (lambda logits: {"logits": np.ma.masked_array(logits)}, "MaskedArray; expected a numpy.ndarray"),
    (lambda logits: {"probabilities": (logits, logits, logits)}, "tuple"),
    (lambda logits: {"logits": (logits,)}, "tuple"),
    (lambda _: {"probabilities": ()}, "tuple"),
    (lambda _: {"probabilities": object()}, "probabilities is a builtins.object"),
    (lambda logits: {"probabilities": logits, "logits": logits}, "logits and probabilities were given on one tick"),
    (lambda logits: {"tokens": logits, "logits": logits}, "tokens and logits were given on one tick"),
    (lambda logits: {"logits": logits, "sequence": 1.5}, "sequence is a float"),
    (lambda logits: {"logits": logits, "observed_ns": "now"}, "observed_ns is a str"),
    (lambda logits: {"logits": logits, "stats": logits}, "stats were given, but tokens of a '.*' bundle are decoded"),
]


@pytest.mark.parametrize("use_worker", [False, True])
def test_beliefs_of_a_wrong_form_are_refused_as_wrong_tokens_are(
    either_tokenizer: ActionTokenizer, use_worker: bool
) -> None:
    model = either_tokenizer.model
    logits = np.zeros((*model.tokens_shape(1), model.vocabulary), np.float32)
    changes = {"use_worker": use_worker, "deadline_us": 1e9 if use_worker else None}
    with loop(either_tokenizer, beliefs=BeliefConfig(), **changes) as decoder:
        decoder.warmup()
        for change, message in WRONG_FORMS:
            assert decoder.step(logits=logits).status is Status.OK
            result = decoder.step(**change(logits))
            assert (result.status, result.is_held) == (Status.BAD_TOKEN, True), result
            with pytest.raises(AssertionError, match=message):
                raise AssertionError(result.detail)
            # What was queued is dropped.
            assert decoder.step().status is Status.STALE
        assert decoder.snapshot().refused_chunks == len(WRONG_FORMS)


@pytest.mark.parametrize("use_worker", [False, True])
def test_values_that_are_no_distribution_are_refused_as_wrong_tokens_are(
    either_tokenizer: ActionTokenizer, use_worker: bool
) -> None:
    model = either_tokenizer.model
    flat = np.full((*model.tokens_shape(1), model.vocabulary), 1 / model.vocabulary, np.float32)
    changes = {"use_worker": use_worker, "deadline_us": 1e9 if use_worker else None}
    wrong: list[tuple[str, float, str]] = [
        ("logits", np.nan, "is nan; expected a finite number"),
        ("logits", np.inf, "is inf; expected a finite number"),
        ("probabilities", np.nan, "is nan; expected a probability"),
        ("probabilities", -0.25, "is -0.25; expected a probability"),
        ("probabilities", 2.0, "sum to .*; expected a distribution"),
    ]
    with loop(either_tokenizer, beliefs=BeliefConfig(), **changes) as decoder:
        decoder.warmup()
        for kind, value, message in wrong:
            given = flat.copy()
            given.reshape(-1)[-1] = value
            assert decoder.step(**{kind: flat}).status is Status.OK
            result = decoder.step(**{kind: given})
            assert (result.status, result.is_held) == (Status.BAD_TOKEN, True), result
            with pytest.raises(AssertionError, match=message):
                raise AssertionError(result.detail)
        assert decoder.step(logits=np.full_like(flat, -np.inf)).status is Status.BAD_TOKEN


def test_temperatures_say_how_many_layers_come(tokenizer: ActionTokenizer) -> None:
    model, most = tokenizer.model, tokenizer.prefixes[-1]
    logits = np.random.default_rng(0).normal(size=(*model.tokens_shape(1), model.vocabulary)).astype(np.float32)
    temperature = tuple(1.5 + layer for layer in range(most))
    with loop(tokenizer, beliefs=BeliefConfig(temperature=temperature)) as decoder:
        decoder.warmup()
        result = decoder.step(logits=logits)
        assert result.belief is not None
        expected = tokenizer.decode_logits(logits, temperature=temperature)
        np.testing.assert_array_equal(result.belief.std, expected.std[0, 0])
        draft = decoder.step(logits=np.ascontiguousarray(logits[..., : tokenizer.prefixes[0], :]))
        assert draft.status is Status.BAD_TOKEN
        assert "expected what the temperatures are for: send that, or calibrate for this" in draft.detail


def test_settings_of_beliefs_make_temperatures_and_an_honest_std(tokenizer: ActionTokenizer) -> None:
    model = tokenizer.model
    logits = np.random.default_rng(0).normal(size=(*model.tokens_shape(1), model.vocabulary)).astype(np.float32)
    temperature = (2.0,) * tokenizer.prefixes[-1]
    kind = BeliefKind(tokenizer.fingerprint, "tokens", len(temperature), tokenizer.prefixes[0])
    settings = BeliefSettings(kind, temperature, {"expected": tuple(range(1, 1 + model.action_dim))})
    with loop(tokenizer, beliefs=BeliefConfig(settings=settings)) as decoder:
        decoder.warmup()
        result = decoder.step(logits=logits)
        assert result.belief is not None
        expected = tokenizer.decode_logits(logits, settings=settings)
        np.testing.assert_array_equal(result.belief.std, expected.std[0, 0])
        assert not np.allclose(result.belief.std, tokenizer.decode_logits(logits, temperature=2.0).std[0, 0])
        draft = decoder.step(logits=np.ascontiguousarray(logits[..., : tokenizer.prefixes[0], :]))
        assert draft.status is Status.BAD_TOKEN
        assert f"expected what the settings: tokens, l = {len(temperature)}, the first" in draft.detail
    for wrong in (replace(kind, fingerprint="1" * 64), replace(kind, coarse=1), replace(kind, length=9)):
        other = replace(settings, kind=wrong, temperature=(2.0,) * wrong.length)
        with pytest.raises(ControlConfigError, match=r"settings of beliefs (are|were)|as no form of them needs"):
            loop(tokenizer, beliefs=BeliefConfig(settings=other))


def test_settings_are_for_tokens_or_for_a_pair(chunk_tokenizer: ActionTokenizer) -> None:
    model: Any = chunk_tokenizer.model
    bits = model.num_tokens * model.token_bits - model.class_bits
    pair = np.zeros((1, model.num_classes), np.float32), np.zeros((1, bits), np.float32)
    words = np.zeros((1, model.num_tokens, model.vocabulary), np.float32)
    forms: tuple[tuple[Any, int, Any, Any], ...] = (
        ("classes and bits", 1 + bits, pair, words), ("tokens", model.num_tokens, words, pair)
    )  # fmt: skip
    for form, size, right, wrong in forms:
        kind = BeliefKind(chunk_tokenizer.fingerprint, form, model.num_tokens, 0)
        settings = BeliefSettings(kind, (1.5,) * size, {"expected": (1.0,) * model.action_dim})
        with loop(chunk_tokenizer, beliefs=BeliefConfig(settings=settings)) as decoder:
            decoder.warmup()
            assert decoder.step(logits=right).status is Status.OK
            assert decoder.step(logits=wrong).status is Status.BAD_TOKEN


def test_a_draft_may_be_a_belief_and_its_whole_tokens_or_the_other_way_round() -> None:
    for first, second in ((0.0, None), (None, 0.0), (0.0, 0.0)):
        with ScriptedLoop(beliefs=BeliefConfig()) as made:
            made.tick(0.1, sequence=7, std=first, layers=made.DRAFT)
            result = made.tick(0.4, sequence=7, std=second)
            assert (result.status, first_of(result)) == (Status.OK, pytest.approx(0.4))
            assert (result.belief is None) is (second is None)
            assert made.tick(0.5, sequence=7, std=0.0, layers=made.DRAFT).status is Status.STALE


def test_beliefs_of_chunk_tokens_are_scripted_as_well() -> None:
    with ScriptedLoop(beliefs=BeliefConfig(std_limit=0.1), recipe=ChunkRecipe(SMALL)) as made:
        assert made.tick(0.5, std=0.2, layers=1).status is Status.UNCERTAIN


# --- what is uncertain ------------------------------------------------------------------------------------------------


@ACTIONS_ON_DOUBT
def test_an_uncertain_action_is_held_slowed_or_passed_on(when_uncertain: str) -> None:
    """Of a motion, a place and a gripper."""
    changes: dict[str, Any] = {
        "action_kind": ("delta", "absolute", "absolute"),
        "gripper": (2,),
        "beliefs": BeliefConfig(std_limit=0.1, when_uncertain=when_uncertain, slow_factor=0.25),  # type: ignore[arg-type]
    }
    with ScriptedLoop(position=(0.0, 0.0, 0.0), **changes) as made:
        assert made.tick(0.8, std=0.1).actions.tolist() == pytest.approx([0.8, 0.8, 0.8])
        result = made.tick(0.4, std=0.2)
        assert (result.status, result.is_held) == (Status.UNCERTAIN, when_uncertain == "hold")
        assert result.actions.tolist() == pytest.approx(
            {"hold": [0.0, 0.8, 0.8], "slow": [0.1, 0.7, 0.8], "ask": [0.4, 0.4, 0.4]}[when_uncertain]
        )
        assert not result.is_limited
        assert result.detail == (
            "std of dimension 0 is 0.2; expected at most 0.1 (std_limit): look at the policy, or at what it sees"
        )
        assert result.belief is not None
        assert (result.belief.std.tolist(), result.belief.mode_probability) == ([pytest.approx(0.2)] * 3, 1.0)
        # The chunk stays in service.
        assert made.tick().status is Status.UNCERTAIN
        assert made.tick(0.4, std=0.0).actions.tolist() == pytest.approx([0.4, 0.4, 0.4])


def test_what_is_slowed_stays_inside_limits_and_slew() -> None:
    beliefs = BeliefConfig(std_limit=0.1, when_uncertain="slow", slow_factor=0.5)  # type: ignore[arg-type]
    with ScriptedLoop(beliefs=beliefs, max_relative_step=(0.25,) * 3, out_of_range="limit") as made:
        for expected, is_limited in ((0.25, True), (0.4, False), (0.4, False)):
            result = made.tick(0.8, std=0.2)
            assert (first_of(result), result.is_limited) == (pytest.approx(expected, abs=1e-5), is_limited)
        # Chunks further outside are brought inside before they are slowed.
        assert first_of(made.tick(9.0, std=0.2)) == pytest.approx(0.5, abs=1e-5)


def test_each_row_and_dimension_has_its_own_std() -> None:
    std = [[0.1, 0.1, 9.0], [0.1, 0.3, 9.0], [0.1, 0.1, 9.0], [0.3, 0.1, 9.0]]
    beliefs = BeliefConfig(std_limit=(0.2, 0.2, np.inf))
    with ScriptedLoop(beliefs=beliefs) as made:
        found = [(result.status, first_of(result)) for result in (made.tick(RAMP, std=std),)]
        found += [(result.status, first_of(result)) for result in (made.tick() for _ in range(3))]
    statuses, values = zip(*found, strict=True)
    assert statuses == (Status.OK, Status.UNCERTAIN, Status.OK, Status.UNCERTAIN)
    assert values == pytest.approx((0.1, 0.0, 0.3, 0.0))


def test_a_dimension_that_is_locked_is_certain_whatever_is_believed_of_it() -> None:
    limits: dict[str, Any] = {"action_low": (-1.0, 0.0, -1.0), "action_high": (1.0, 0.0, 1.0)}
    with ScriptedLoop(beliefs=BeliefConfig(std_limit=0.1), **limits) as made:
        assert made.tick(0.5, std=[0.1, 9.0, 0.1]).status is Status.OK
        result = made.tick(0.5, std=[0.1, 9.0, 0.2])
        assert result.status is Status.UNCERTAIN
        assert result.detail.startswith("std of dimension 2 is 0.2; expected at most 0.1")


def test_a_limit_beyond_float32_is_none() -> None:
    with ScriptedLoop(beliefs=BeliefConfig(std_limit=1e300)) as made:
        assert made.tick(0.5, std=3e38).status is Status.OK


def test_a_mode_that_is_not_sure_makes_all_its_actions_uncertain() -> None:
    with ScriptedLoop(beliefs=BeliefConfig(least_mode_probability=0.6)) as made:
        assert made.tick(RAMP, std=9.0, mode_probability=0.6).status is Status.OK
        assert made.tick(RAMP, std=0.0, mode_probability=0.59).status is Status.UNCERTAIN
        assert made.decoder.result.detail == (
            "the likeliest mode has a probability of 0.59; expected at least 0.6 (least_mode_probability): look at the "
            "policy, or at what it sees"
        )
        assert made.tick().status is Status.UNCERTAIN


def test_a_mode_that_nobody_believes_in_is_served_where_there_is_no_limit() -> None:
    with ScriptedLoop(beliefs=BeliefConfig()) as made:
        assert made.tick(0.5, std=9.0, mode_probability=0.0).status is Status.OK


def test_a_limit_of_one_kind_leaves_the_other_alone() -> None:
    with ScriptedLoop(beliefs=BeliefConfig(std_limit=0.1, leave_factor=0.5)) as made:
        assert made.tick(0.5, std=0.2, mode_probability=0.01).status is Status.UNCERTAIN
        assert made.tick(0.5, std=0.05, mode_probability=0.01).status is Status.OK


@pytest.mark.parametrize(
    ("stds", "uncertain"),
    [
        ([0.1, 0.11, 0.09, 0.11, 0.081, 0.08, 0.1], "-xxxx--"),
        ([0.11, 0.08, 0.09, 0.08, 0.08, 0.1, 0.11, 0.0], "x-----x-"),
    ],
)
def test_being_uncertain_ends_well_below_the_limit(stds: list[float], uncertain: str) -> None:
    with ScriptedLoop(beliefs=BeliefConfig(std_limit=0.1, leave_factor=0.8)) as made:
        found = [made.tick(0.5, std=std).status is Status.UNCERTAIN for std in stds]
        assert "".join("-x"[is_uncertain] for is_uncertain in found) == uncertain
        made.tick(0.5, std=0.11)
        made.tick(0.5, std=0.09)
        assert made.decoder.result.detail == (
            "it was uncertain before, and is not yet sure enough (leave_factor, leave_ticks)"
        )


@pytest.mark.parametrize(
    ("probabilities", "uncertain"), [([0.6, 0.59, 0.6, 0.67, 0.68, 0.6, 0.1, 1.0], "-xxx--x-"), ([1.0], "-")]
)
def test_what_a_mode_lacks_of_certainty_ends_well_below_what_it_may_lack(
    probabilities: list[float], uncertain: str
) -> None:
    with ScriptedLoop(beliefs=BeliefConfig(least_mode_probability=0.6, leave_factor=0.8)) as made:
        found = [
            made.tick(0.5, std=0.0, mode_probability=float(np.nextafter(np.float32(found), np.float32(1)))).status
            for found in probabilities
        ]
        assert "".join("-x"[status is Status.UNCERTAIN] for status in found) == uncertain


def test_so_many_ticks_in_a_row_have_to_be_sure() -> None:
    with ScriptedLoop(beliefs=BeliefConfig(std_limit=0.1, leave_factor=0.5, leave_ticks=3)) as made:
        stds = [0.2, 0.0, 0.0, 0.07, 0.0, 0.0, 0.0, 0.07, 0.2, None, 0.0, 0.0, 0.0]
        found = [made.tick(0.5, std=std).status is Status.UNCERTAIN for std in stds]
        # Tokens do not say how sure they are: they neither end it nor count.
        assert "".join("-x"[is_uncertain] for is_uncertain in found) == "xxxxxx--x-xx-"


def test_a_reset_ends_being_uncertain_and_a_fault_does_not() -> None:
    with ScriptedLoop(beliefs=BeliefConfig(std_limit=0.1)) as made:
        made.tick(0.5, std=0.2)
        made.wrong()
        assert made.tick(0.5, std=0.09).status is Status.UNCERTAIN
        made.decoder.reset()
        assert made.tick(0.5, std=0.09).status is Status.OK


def test_the_newest_chunk_decides_where_chunks_are_averaged() -> None:
    for strategy in ("weighted_average", "temporal_ensemble"):
        with ScriptedLoop(strategy=strategy, beliefs=BeliefConfig(std_limit=0.1)) as made:
            assert made.tick(0.5, std=0.2).status is Status.UNCERTAIN
            assert made.tick(0.5, std=0.01).status is Status.OK
            assert made.tick(0.5, std=0.2).status is Status.UNCERTAIN


def test_an_action_that_is_taken_again_within_its_tick_counts_once() -> None:
    """Something older has become too old while the newest was decoded."""
    beliefs = BeliefConfig(std_limit=0.1, leave_ticks=2, when_uncertain="ask")  # type: ignore[arg-type]
    with ScriptedLoop(strategy="weighted_average", new_weight=0.75, beliefs=beliefs) as made:
        first = made.clock.now + 2_000_000
        made.tick(0.0, observed_ns=first, std=0.2)
        begin = first + 2_000_000
        made.clock.readings = [begin, first + 10 * 2_000_000 + 1]
        result = made.tick(0.8, observed_ns=begin, std=0.0)
        assert (result.status, first_of(result)) == (Status.UNCERTAIN, pytest.approx(0.8))
        assert result.detail.count("it was uncertain before") == 1
        assert made.decoder._loop.state.doubt == 1  # of two


# --- statuses, counters, faults ---------------------------------------------------------------------------------------


@ACTIONS_ON_DOUBT
@pytest.mark.parametrize("on_fault", ["hold_last", "stop", "raise"])
def test_standing_still_is_a_fault_and_going_on_is_none(when_uncertain: str, on_fault: str) -> None:
    beliefs = BeliefConfig(std_limit=0.1, when_uncertain=when_uncertain)  # type: ignore[arg-type]
    with ScriptedLoop(beliefs=beliefs, on_fault=on_fault) as made:
        if when_uncertain == "hold" and on_fault == "raise":
            with pytest.raises(ControlFaultError, match=r"^UNCERTAIN: std of dimension 0 is 0.2"):
                made.tick(0.5, std=0.2)
        else:
            made.tick(0.5, std=0.2)
        result, is_held = made.decoder.result, when_uncertain == "hold"
        assert (result.status, result.is_held) == (Status.UNCERTAIN, is_held)
        assert result.is_latched is (is_held and on_fault == "stop")
        snapshot = made.decoder.snapshot()
        assert (snapshot.statuses["UNCERTAIN"], snapshot.held, snapshot.chunks, snapshot.refused_chunks) == (
            1, int(is_held), 1, 0,
        )  # fmt: skip
        assert 'rfsq_control_ticks_total{status="uncertain"} 1' in made.decoder.openmetrics()


def test_being_uncertain_is_told_once_and_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ScriptedLoop(beliefs=BeliefConfig(std_limit=0.1), record_folder=str(tmp_path)) as made:
        for std in (0.0, 0.2, 0.2, 0.0):
            made.tick(0.5, std=std)
        assert made.decoder.flush()
        assert made.decoder.snapshot().incidents == 1
        assert "tick 2: UNCERTAIN, standing still: std of dimension 0 is 0.2" in caplog.text
        assert len(list(tmp_path.iterdir())) == 1


def test_what_else_is_to_be_said_of_an_uncertain_action_is_said() -> None:
    with ScriptedLoop(beliefs=BeliefConfig(std_limit=0.1), out_of_range="limit", fallbacks=1) as made:
        result = made.tick(2.0, std=0.2)
        assert result.status is Status.UNCERTAIN
        assert result.detail.startswith("actions[0, 0] is 2.0; expected -1.0 to 1.0")
        assert "; and std of dimension 0 is 0.2" in result.detail
        result = made.tick(0.5, std=0.2, fails=True)
        assert (result.status, result.fell_back) == (Status.UNCERTAIN, True)
        assert "injected; decoded on scripted instead; and std of" in result.detail
        result = made.tick(0.5, std=0.2, sequence=-5)
        assert result.status is Status.UNCERTAIN
        assert "chunk -5 comes after a newer one" in result.detail


def test_a_belief_that_comes_late_is_stale_and_says_nothing_of_what_is_served() -> None:
    with ScriptedLoop(beliefs=BeliefConfig(std_limit=0.1)) as made:
        made.tick(RAMP, std=0.0, sequence=5)
        result = made.tick(0.9, std=0.2, sequence=4)
        assert (result.status, first_of(result)) == (Status.STALE, pytest.approx(0.2))


@pytest.mark.parametrize(
    "broken", [{"std": np.nan}, {"std": np.inf}, {"std": -0.1}, {"mode_probability": np.nan}, {"mode_probability": 2.0}]
)
def test_a_backend_whose_std_or_probability_is_none_has_failed(broken: dict[str, float]) -> None:
    with ScriptedLoop(beliefs=BeliefConfig(), fallbacks=1) as made:
        assert made.tick(0.5, std=0.0).status is Status.OK
        made.spares[0][1].decode_belief_into = lambda *_: None  # type: ignore[method-assign]  # it writes nothing
        result = made.tick(0.5, **{"std": 0.0, **broken})
        assert (result.status, result.is_held) == (Status.NONFINITE, True)
        assert "values that are not finite" in result.detail


@pytest.mark.parametrize("missing", ["std", "mode_probability"])
def test_a_backend_that_leaves_a_part_unwritten_passes_off_no_older_one(missing: str) -> None:
    with ScriptedLoop(beliefs=BeliefConfig()) as made:
        decode = made.backend.decode_belief_into

        def leave_out(question: BeliefQuestion, answer: BeliefAnswer) -> None:
            decode(question, answer._replace(**{missing: np.empty_like(getattr(answer, missing))}))

        assert made.tick(0.5, std=0.0).status is Status.OK
        made.backend.decode_belief_into = leave_out  # type: ignore[method-assign]
        assert made.tick(0.5, std=0.0).status is Status.NONFINITE


def test_a_backend_that_fails_on_beliefs_is_replaced_and_not_used_again_until_it_decodes_them(
    tokenizer: ActionTokenizer,
) -> None:
    broken, backend = switched(tokenizer, "broken")
    model = tokenizer.model
    logits = np.zeros((*model.tokens_shape(1), model.vocabulary), np.float32)
    with loop(broken, fallbacks=(tokenizer,), beliefs=BeliefConfig(), clock=Clock()) as decoder:
        decoder.warmup()
        backend.act = fails
        result = decoder.step(logits=logits)
        assert (result.status, result.fell_back) == (Status.OK, True)
        backend.act = None
    warm = WarmTokenizer(broken, 0, BeliefConfig())
    assert warm.works()
    decode = tokenizer.backend.decode_belief_into  # type: ignore[attr-defined]  # this one has it
    for name, factor in (("std", 1.001), ("actions", 1.001), ("mode_probability", 1.0)):

        def off(question: Any, answer: Any, name: str = name, factor: float = factor) -> None:
            decode(question, answer)
            getattr(answer, name)[...] *= factor

        backend.decode_belief_into = off  # type: ignore[method-assign]
        assert warm.works() is (factor == 1)


def test_the_rehearsal_of_beliefs_leaves_nothing_behind(either_tokenizer: ActionTokenizer) -> None:
    beliefs = BeliefConfig(std_limit=1e-6, least_mode_probability=1.0)
    with loop(either_tokenizer, beliefs=beliefs, on_fault="stop", max_consecutive_faults=1) as decoder:
        decoder.warmup()
        assert (decoder.snapshot().ticks, decoder.result.is_latched) == (0, False)
        tokens = chunks_of(either_tokenizer, 16)[0][0]
        assert decoder.step(tokens).status is Status.OK
