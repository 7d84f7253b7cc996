"""Joints that rest far from zero, in units of their own movement, on the GPU: its engines subtract before they sum."""

import json
from pathlib import Path

import numpy as np
import pytest

from rfsq.export.build_config import BuildConfig
from rfsq.export.pipeline import build
from rfsq.export.plan import DeployMode
from rfsq.rfsq_ref.data import load_demonstrations
from rfsq.rfsq_ref.normaliser import Normaliser
from rfsq.rfsq_ref.settings import NormaliserKind
from tests.gpu.conftest import ENGINES
from tests.rfsq_ref.units import restore

#: No power of two, so that folding them rounds.
SCALES = (0.3, 0.7, 1.1, 0.05, 2.3, 1.7, 0.9)
CASES = {
    "0": [0] * 7,
    "20": [20] * 7,
    "1000": [1000] * 7,
    "mixed": [0, 4, 6, 10, 20, 100, 1000],
}


@pytest.mark.parametrize("mode", [DeployMode.CALIBRATED, DeployMode.DYNAMIC])
@pytest.mark.parametrize("ratios", CASES.values(), ids=CASES)
def test_every_backend_passes_every_gate(
    mode: DeployMode, ratios: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    offset, scale = (np.array(values, np.float32) for values in (np.multiply(ratios, SCALES), SCALES))
    normaliser = Normaliser(NormaliserKind.MIN_MAX, tuple(map(float, offset)), tuple(map(float, scale)))
    (tmp_path / "normaliser.json").write_text(json.dumps(normaliser.to_json()), encoding="utf-8")
    episodes = load_demonstrations().episodes
    np.savez(
        tmp_path / "episodes.npz",
        **{f"episode_{i}": restore(normaliser, steps).astype(np.float32) for i, steps in enumerate(episodes)},
    )
    manifest = build(
        BuildConfig(
            output=tmp_path / "bundle",
            conditioning=mode,
            normaliser=tmp_path / "normaliser.json",
            data=tmp_path / "episodes.npz",
            backends=("onnxruntime", "onnxruntime-cuda", *ENGINES),
            parity_steps=30_000,
        )
    )
    parity = manifest.parity
    with capsys.disabled():
        print()
        for entry in parity:
            print(f"  {entry.backend}, {entry.gate}: {entry.value:.4g} <= {entry.limit:.4g}")
    assert {entry.backend for entry in parity} == {"onnxruntime", "onnxruntime-cuda", *ENGINES}
    assert all(entry.value <= entry.limit for entry in parity)
    assert all(entry.value == 0 for entry in parity if entry.gate.endswith("wrong tokens"))
