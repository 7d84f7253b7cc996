"""The limits themselves: whoever changes one changes it here, too, and says why in `runtime/bundle/gates.py`."""

import numpy as np
import pytest

from rfsq.runtime.backends.registry import GPU_BACKENDS
from rfsq.runtime.bundle.gates import (
    GATES,
    Gates,
    highest_bounds,
    highest_limit,
    missing_gates,
    near_tie_cap,
    promised_refusal,
)

#: As `inspect_bundle.py` and `selftest.py` print them.
HIGHEST = {
    "encode: wrong tokens": 0,
    "golden vectors, encode, batch 318: wrong tokens": 0,
    "encode: near-tie flips": 192 * 8 * (2 + 0.05 * 7) + 35,
    "encode: stats error": 1e-5,
    "encode, batch 1: max |stats error|": 1e-5,
    "decode 3 layers: action error": 1e-5,
    "golden vectors, decode 8 layers, batch 2: max |action error|": 1e-5,
    "encode and decode, batch 2: max |action error|": 1e-5,
    "encode and decode, batch 318: max |action error| of 451 steps with a near-tie flip": 10,
    "encode: illegal values accepted": 0,
    "decode 3 layers: illegal values not marked": 0,
}
DECODERS = ["3 layers", "8 layers"]
NEEDED = [
    "encode: wrong tokens",
    "encode: near-tie flips",
    "decode 3 layers: action error",
    "decode 8 layers: action error",
]


def test_the_limits_are_those_that_were_agreed_upon() -> None:
    agreed = Gates(
        wrong_tokens=0,
        near_tie_ratio=2.0,
        near_tie_scatter=35,
        near_tie_share=0.05,
        action_error=1e-5,
        illegal_values=0,
        flip_error=10.0,
        stats_error=1e-5,
        latent_bound=2e-4,
        bound_growth=4.0,
        unlikely_bounds=0.05,
        excused_share=0.5,
    )
    assert agreed == GATES


#: How far a correct implementation's mean count of flips may lie above torch's, and how often it may fail for that.
MEAN_RATIO, MOST_FAILURES = 1.25, 1e-6


def poisson(mean: float, size: int) -> np.ndarray:
    """The probability of each of 0 ... size - 1."""
    counts = np.arange(size)
    return np.exp(counts * np.log(mean) - mean - np.cumsum(np.log(np.maximum(counts, 1))))


def failures(mean: float, scatter: int) -> float:
    """How probable it is that a correct implementation flips more than twice what torch does, and so many."""
    torchs = poisson(mean, 400)
    above = poisson(MEAN_RATIO * mean, 1000)[::-1].cumsum()[::-1]
    return float(torchs @ above[int(GATES.near_tie_ratio) * np.arange(400) + scatter + 1])


def test_the_scatter_of_near_ties_is_the_least_with_which_correct_implementations_do_not_fail() -> None:
    means = np.geomspace(0.01, 200, 400)
    assert max(failures(mean, GATES.near_tie_scatter) for mean in means) < MOST_FAILURES
    assert max(failures(mean, GATES.near_tie_scatter - 1) for mean in means) > MOST_FAILURES
    # Twice as many alone: of builds in which torch has about one, three in ten would be red.
    assert max(failures(mean, 0) for mean in means) > 0.3


def test_where_torch_has_no_near_tie_others_may_have_some_and_where_it_has_many_twice_as_many() -> None:
    assert [near_tie_cap(flips) for flips in (0, 0.5, 1, 2, 7_796)] == [35, 36, 37, 39, 15_627]


@pytest.mark.parametrize("gate", HIGHEST)
def test_no_manifest_may_state_more_than_this(gate: str) -> None:
    assert highest_limit(gate, num_steps=192, num_latents=7, depth=8) == HIGHEST[gate]


@pytest.mark.parametrize(
    "gate",
    [
        "", "wrong tokens", "encode: right tokens", "encode: wrong tokens ", "encode: wrong tokens: maybe",
        "encode: max |action error| of some steps with a near-tie flip",
        "max |action error| of 5 steps with a near-tie flip, perhaps",
    ],
)  # fmt: skip
def test_a_name_that_is_none_of_a_gate_has_no_limit(gate: str) -> None:
    assert highest_limit(gate, num_steps=192, num_latents=7, depth=8) is None


def test_the_bounds_of_a_layer_may_grow_by_its_levels() -> None:
    assert highest_bounds(num_levels=7, num_layers=3) == pytest.approx([6e-4, 6e-4 * 28, 6e-4 * 28**2])


def test_every_engine_has_to_pass_each_of_these() -> None:
    assert missing_gates((), DECODERS, has_stats=False) == NEEDED
    assert missing_gates((), DECODERS, has_stats=True) == [
        *NEEDED[:2],
        "encode: stats error",
        *NEEDED[2:],
    ]


def test_what_promises_to_refuse_or_to_mark_illegal_values_has_to_be_judged_by_them() -> None:
    refusals = [f"{part}: illegal values accepted" for part in ("encode", "decode 3 layers", "decode 8 layers")]
    needed = [*NEEDED, *refusals]
    assert missing_gates((), DECODERS, has_stats=False, refusal="illegal values accepted") == needed
    found = [*NEEDED, "golden vectors, encode: illegal values accepted", *refusals[1:]]
    assert missing_gates(found, DECODERS, has_stats=False, refusal="illegal values accepted") == []
    # Of a variant, and of the other promise.
    found = [*NEEDED, "uint8 tokens, encode: illegal values accepted", "encode: illegal values not marked"]
    assert missing_gates(found, DECODERS, has_stats=False, refusal="illegal values accepted") == refusals


def test_gpus_mark_and_generated_c_refuses_in_calls_of_up_to_64_steps() -> None:
    assert {promised_refusal(backend, 1000) for backend in GPU_BACKENDS} == {"illegal values not marked"}
    assert [promised_refusal("c", length) for length in (1, 64, 65)] == ["illegal values accepted"] * 2 + [""]
    assert promised_refusal("onnxruntime", 1) == ""


@pytest.mark.parametrize("without", NEEDED)
def test_the_one_that_was_not_run_is_named(without: str) -> None:
    assert missing_gates([gate for gate in NEEDED if gate != without], DECODERS, has_stats=False) == [without]


@pytest.mark.parametrize(
    ("found", "needed"),
    [
        ("golden vectors, encode, batch 318: wrong tokens", "encode: wrong tokens"),
        ("encode, batch 1: near-tie flips", "encode: near-tie flips"),
        ("decode 8 layers, batch 1: max |action error|", "decode 8 layers: action error"),
        ("encode: max |stats error|", "encode: stats error"),
    ],
)
def test_the_replays_names_are_those_of_the_build(found: str, needed: str) -> None:
    every = missing_gates((), DECODERS, has_stats=True)
    assert missing_gates([found], DECODERS, has_stats=True) == [gate for gate in every if gate != needed]


def test_the_gates_of_another_prefix_or_of_steps_with_a_flip_stand_for_none() -> None:
    others = ["decode 5 layers: action error", "decode 8 layers: max |action error| of 5 steps with a near-tie flip"]
    assert missing_gates(others, DECODERS, has_stats=False) == NEEDED
