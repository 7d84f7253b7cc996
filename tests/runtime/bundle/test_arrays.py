"""Steps become chunks in order, and nothing is lost or added but what fills the last one."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rfsq.runtime.bundle.arrays import in_chunks


@given(num_steps=st.integers(0, 50), chunk_length=st.integers(1, 60))
def test_steps_become_chunks_in_order_and_the_last_is_filled_up_with_the_last_step(
    num_steps: int, chunk_length: int
) -> None:
    steps = np.arange(2 * num_steps, dtype=np.float32).reshape(num_steps, 2)
    chunks = in_chunks(steps, chunk_length)

    assert chunks.shape == (-(-num_steps // chunk_length), chunk_length, 2)
    assert chunks.dtype == np.float32
    flat = chunks.reshape(-1, 2)
    np.testing.assert_array_equal(flat[:num_steps], steps)
    assert (flat[num_steps:] == steps[-1:]).all()
