"""Models of any size and mode, through kernels for few and for many steps, for int32 and for bytes."""

from pathlib import Path

import numpy as np
import pytest

from rfsq.export.plan import DeployMode
from rfsq.rfsq_ref.autoencoder import ModelConfig
from rfsq.runtime.backends.contract import judged
from rfsq.runtime.backends.gpu.driver import open_device
from rfsq.runtime.backends.registry import create_backend
from rfsq.runtime.backends.replay import replay
from rfsq.runtime.bundle.folder import open_bundle
from rfsq.runtime.bundle.golden import read_golden
from rfsq.runtime.bundle.manifest import GOLDEN_NAME, kernel_name, token_types
from tests.bundles import SMALL, Recipe, deploy, generate_cuda, write_bundle

#: Sizes that no vector divides, that need more threads than one warp, one of everything, and levels that no byte holds.
SIZES = {
    "published": ModelConfig(action_dim=7, latent_dim=16, hidden_width=64, num_layers=8, num_levels=7),
    "small": SMALL,
    "odd": ModelConfig(action_dim=5, latent_dim=3, hidden_width=13, num_layers=3, num_levels=2),
    "odd, whole words": ModelConfig(action_dim=9, latent_dim=12, hidden_width=35, num_layers=5, num_levels=6),
    "two arms": ModelConfig(action_dim=14, latent_dim=10, hidden_width=96, num_layers=6, num_levels=9),
    "wide": ModelConfig(action_dim=14, latent_dim=40, hidden_width=130, num_layers=5, num_levels=9),
    "fine": ModelConfig(action_dim=2, latent_dim=4, hidden_width=8, num_layers=2, num_levels=1001),
    "128 levels": ModelConfig(action_dim=3, latent_dim=8, hidden_width=20, num_layers=2, num_levels=128),
    "255 levels": ModelConfig(action_dim=3, latent_dim=8, hidden_width=20, num_layers=2, num_levels=255),
    "65537 levels": ModelConfig(action_dim=3, latent_dim=4, hidden_width=8, num_layers=1, num_levels=65537),
    "wide hidden": ModelConfig(action_dim=7, latent_dim=16, hidden_width=1024, num_layers=2, num_levels=7),
    "wider than shared memory": ModelConfig(action_dim=5, latent_dim=64, hidden_width=256, num_layers=2, num_levels=7),
    "least": ModelConfig(action_dim=1, latent_dim=2, hidden_width=1, num_layers=1, num_levels=2),
}
#: Beyond 8,192 steps, and 10 more than whole warps: where slices of the host are as large, the kernels for many steps
#: are chosen as well as judged.
CHUNK, CHUNKS = 2, 4101


@pytest.mark.parametrize("mode", DeployMode)
@pytest.mark.parametrize("size", SIZES)
def test_every_size_and_mode_passes_its_golden_vectors(mode: DeployMode, size: str, tmp_path: Path) -> None:
    config = SIZES[size]
    prefixes = (max(1, config.num_layers - 1),)
    recipe = Recipe(
        mode=mode,
        config=config,
        chunk_length=CHUNK,
        prefixes=prefixes,
        num_chunks=CHUNKS,
        has_engine=False,
        compute_capability=open_device().compute_capability,
    )
    bundle = open_bundle(write_bundle(tmp_path / "bundle", recipe))
    golden = read_golden(bundle.content(GOLDEN_NAME), bundle.manifest.model)
    backend = create_backend("cuda", bundle)
    try:
        result = replay(golden, bundle.manifest.model, backend)
        assert [str(check) for check in result.failures] == []
        gates = {check.gate for check in result.checks}
        for token_type in token_types(config.num_levels):
            suffix = "" if token_type == "int32" else f", {token_type} tokens"
            assert f"encode, batch {CHUNKS}{suffix}: wrong tokens" in gates
        if has_many(config, mode):
            assert f"encode, batch {CHUNKS}, many steps: wrong tokens" in gates
        # In one batch and in small ones, and by every kernel: the same tokens, and the same bits of actions.
        tokens, stats = np.empty_like(golden.tokens), None if golden.stats is None else np.empty_like(golden.stats)
        together = np.empty_like(golden.actions)
        backend.encode_into(golden.actions, tokens, stats)
        backend.decode_into(tokens, stats, together)
        for variant in judged(backend).values():
            apart, in_parts = np.empty_like(tokens), np.empty_like(together)
            stats_apart = None if stats is None else np.empty_like(stats)
            for start in range(0, CHUNKS, 1000):
                part = slice(start, start + 1000)
                variant.encode_into(golden.actions[part], apart[part], None if stats is None else stats_apart[part])
                variant.decode_into(tokens[part], None if stats is None else stats[part], in_parts[part])
            assert (tokens == apart).all()
            assert np.array_equal(together, in_parts)
            assert stats is None or np.array_equal(stats, stats_apart)
    finally:
        backend.close()


def has_many(config: ModelConfig, mode: DeployMode = DeployMode.CALIBRATED) -> bool:
    source = generate_cuda(deploy(Recipe(mode=mode, config=config, prefixes=(1,))))
    return f" {kernel_name(None, 'int32', 'many')}(" in source


def test_some_of_these_sizes_have_kernels_for_many_steps_and_some_have_none() -> None:
    having = {size for size, config in SIZES.items() if has_many(config)}
    assert having >= {"published", "odd, whole words", "two arms", "128 levels", "wide hidden"}
    assert not having & {"wide", "fine", "255 levels", "odd", "wider than shared memory"}
