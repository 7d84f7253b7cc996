"""What hypothesis draws for more than one room."""

from __future__ import annotations

from hypothesis import strategies as st

from rfsq.export.plan import DeployMode
from rfsq.rfsq_ref.autoencoder import ModelConfig
from tests.bundles import Recipe


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Models of any size in any mode."""
    mode = draw(st.sampled_from(list(DeployMode)))
    config = ModelConfig(
        action_dim=draw(st.integers(1, 9)),
        latent_dim=draw(st.integers(2 if mode.conditioning.value == "dynamic" else 1, 20)),
        hidden_width=draw(st.integers(1, 70)),
        num_layers=draw(st.integers(1, 6)),
        num_levels=draw(st.integers(2, 17)),
    )
    return Recipe(
        mode,
        config,
        chunk_length=draw(st.integers(1, 9)),
        prefixes=tuple(draw(st.sets(st.integers(1, config.num_layers), max_size=2))),
        num_chunks=draw(st.integers(1, 5)),
        has_normaliser=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )
