"""For all rooms: how tests run, and the embedded checkpoints and demonstrations, read once."""

import gc
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from rfsq.rfsq_ref.checkpoints import NAIVE_CHECKPOINT, ROBUST_CHECKPOINT, Checkpoint, load_checkpoint
from rfsq.rfsq_ref.data import ActionDataset, EpisodeSplit, load_demonstrations, split_episodes

HERE = Path(__file__).parent
# Small matrices: more threads only wait for each other, and for whatever else runs. In processes that tests start, too.
torch.set_num_threads(1)
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
# What tests write is read back through the kernel, never after a loss of power, so none waits for a disk; a descriptor
# that is none is still refused. Tests of what is said when it fails put a refusal of their own here.
os.fsync = lambda descriptor: os.fstat(descriptor) and None
# No test judges time.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

#: Left out by `make quick` as a whole: they build bundles, compile, train, or run the whole system. Single tests that
#: take long are marked where they stand.
SLOW = frozenset(
    {
        "calibration/test_fit.py", "calibration/test_fit_chunk.py", "calibration/test_report.py",
        "calibration/test_small_fits.py",
        "calibration/test_study.py", "evidence/test_cells.py", "evidence/test_comparison.py",
        "evidence/test_findings.py", "evidence/test_page.py", "evidence/test_peers.py", "evidence/test_report.py",
        "evidence/test_residual_peers.py", "evidence/test_rollouts.py", "evidence/test_schemes.py",
        "examples/test_control_loop.py", "export/test_belief_graphs.py", "export/test_build_engine.py",
        "export/test_bundle_writer.py",
        "export/test_c_builder.py", "export/test_c_compilers.py", "export/test_c_source.py",
        "export/test_c_timing.py", "export/test_chunk_c_source.py", "export/test_cuda_on_cpu.py",
        "export/test_example.py", "export/test_far_from_zero.py", "export/test_golden_inputs.py",
        "export/test_on_target.py",
        "export/test_same_bytes.py", "rfsq_ref/test_generate_demonstrations.py", "evidence/test_rollout.py",
        "rfsq_ref/test_rounding.py", "rfsq_ref/test_train.py", "rfsq_ref/test_train_modal.py",
        "runtime/benchmark/test_bench.py", "runtime/qualification/test_campaign.py",
        "runtime/qualification/test_replay_flight.py", "runtime/qualification/test_soak.py",
        "runtime/control/test_state_machine.py", "runtime/datasets/test_faults.py",
        "runtime/datasets/test_ray.py", "runtime/datasets/test_resume.py", "runtime/policy/test_policies.py",
        "runtime/policy/test_libraries.py", "runtime/backends/test_refusal.py", "runtime/test_scripts.py",
        "runtime/datasets/test_tokenize.py",
    }
)  # fmt: skip


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`make quick` does not even import them: what they test is slow to import, too."""
    if config.option.markexpr != "not slow" or not collection_path.is_relative_to(HERE):
        return None
    return True if collection_path.relative_to(HERE).as_posix() in SLOW else None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Imports make hundreds of thousands of objects that stay: to look for garbage among them is in vain."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.relative_to(HERE).as_posix() in SLOW:
            item.add_marker(pytest.mark.slow)
    # The longest first: at the end, all but one worker would wait for them.
    items.sort(key=lambda item: item.path.name != "test_documentation.py")


def pytest_collection_finish() -> None:
    """What imports have made stays: half a second for every `gc.collect` that looks at it, of which there are many."""
    gc.collect()
    gc.freeze()


def pytest_runtest_teardown() -> None:
    # Training sets it for the whole process; what runs next is to find torch as its users do.
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def demonstrations() -> ActionDataset:
    return load_demonstrations()


@pytest.fixture(scope="session")
def split(demonstrations: ActionDataset) -> EpisodeSplit:
    return split_episodes(demonstrations)


@pytest.fixture(scope="session")
def robust() -> Checkpoint:
    """As embedded: without constants, whether or not the file should ever bring some."""
    return replace(load_checkpoint(ROBUST_CHECKPOINT), constants=None, recovered={})


@pytest.fixture(scope="session")
def naive() -> Checkpoint:
    return load_checkpoint(NAIVE_CHECKPOINT)
