"""Train the policies that are driven in the simulator, side by side, and keep their weights."""

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor

from rfsq.evidence.devices import all_devices, device_name
from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.networks import NetworkRecipe
from rfsq.evidence.oat import OatConfig, OatNetwork
from rfsq.evidence.policies import PolicyConfig, TokenPolicy, policy_of, train_policy
from rfsq.evidence.policy_lessons import CHUNK_LENGTH, SHOWN, Lessons, meant, parts_of
from rfsq.evidence.policy_recordings import Recording
from rfsq.evidence.policy_study import prepare
from rfsq.evidence.policy_tokens import NetworkTokens, oat_tokens
from rfsq.evidence.workers import in_processes
from rfsq.rfsq_ref.expert import ACTION_DIM
from rfsq.rfsq_ref.tensor_files import load_safetensors
from rfsq.runtime.bundle.paths import replacing

#: Of what says the values of a chunk, by least squares.
ACTIONS = "actions"
OAT = "OAT, 8 registers"
OAT_REGISTERS = (1, 2, 4, 8)
OAT_FILE = "oat.safetensors"
#: Half of float32's bytes, and its rounding is far below what a policy knows.
_KEPT = torch.float16
#: Steps after which a training says first how fast it is, and then again and again.
_FIRST_SAID, _SAID_EVERY = 100, 500


@dataclass(frozen=True)
class PolicyKind:
    """What one file of weights holds: policies on the same tokens, one for each seed. vocabulary: None where they say
    values; size: how many tokens, or values, a chunk has; device: what trained them."""

    name: str
    context_size: int
    vocabulary: int | None
    size: int
    device: str
    config: dict[str, Any]


@dataclass(frozen=True, eq=False)
class TrainingJob:
    """seen: float32 [n, C], normalised; targets: one row for each, tokens int16 or values float32."""

    kind: PolicyKind
    seed: int
    seen: npt.NDArray[Any]
    targets: npt.NDArray[Any]
    device: str


@dataclass(frozen=True, eq=False)
class SeeingPolicies:
    """One file of weights: by seed, for contexts less `mean` over `deviation`, float32 [C] both."""

    kind: PolicyKind
    mean: Tensor
    deviation: Tensor
    by_seed: Mapping[int, TokenPolicy]


def normalisation(seen: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation [C] of contexts; 1 where one never changes."""
    deviation = seen.std(dim=0)
    return seen.mean(dim=0), torch.where(deviation > 1e-6, deviation, 1.0)


def train_job(job: TrainingJob) -> tuple[PolicyKind, int, float, dict[str, npt.NDArray[Any]]]:
    """The kind, the seed, the last loss, and the weights by name."""
    if job.device != "cpu":
        # What is recorded goes to the current device.
        torch.cuda.set_device(job.device)
    torch.manual_seed(job.seed)
    seen, targets = (torch.from_numpy(part).to(job.device) for part in (job.seen, job.targets))
    if job.kind.vocabulary is not None:
        targets = targets.long()
    config = PolicyConfig(**job.kind.config)
    policy = policy_of(job.kind.context_size, job.kind.vocabulary, job.kind.size, config).to(job.device)
    loss = train_policy(policy, seen, targets, job.seed, _watching(f"{job.kind.name}, seed {job.seed}", config.steps))
    weights = {name: value.to(_KEPT).cpu().numpy() for name, value in policy.state_dict().items()}
    return job.kind, job.seed, loss, weights


def _watching(name: str, steps: int) -> Callable[[int, Tensor], None]:
    """What says now and then how far a training is, and how many steps it did in a second since it said so last."""
    print(f"{name}: begins", flush=True)
    last, since = 0, time.monotonic()

    def watch(done: int, loss: Tensor) -> None:
        nonlocal last, since
        if done == _FIRST_SAID or done % _SAID_EVERY == 0:
            # Reading it waits for the GPU, so that the clock is right.
            mean, now = float(loss), time.monotonic()
            speed = (done - last) / max(now - since, 1e-9)
            print(f"{name}: {done} of {steps} steps, {speed:.0f} a second, loss {mean:.4f}", flush=True)
            last, since = done, now

    return watch


def training_jobs(
    rows: Tensor, targets: Mapping[str, tuple[int | None, Tensor]], config: PolicyConfig, seeds: Sequence[int]
) -> list[TrainingJob]:
    """Every kind with every seed: seed by seed, so that a run that was stopped can compare all kinds, and short ones
    first. rows: contexts [n, C], normalised; targets: see `targets_of`."""
    kinds = [
        (
            PolicyKind(name, rows.shape[1], vocabulary, found.shape[1], device_name(), _settings(config, name)),
            _compact(found),
        )
        for name, (vocabulary, found) in targets.items()
    ]
    kinds.sort(key=lambda entry: _length(entry[0]))
    places = cycle(all_devices())
    return [TrainingJob(kind, seed, rows.numpy(), found, next(places)) for seed in seeds for kind, found in kinds]


def train_all(jobs: Sequence[TrainingJob], normalised: tuple[Tensor, Tensor], workers: int, folder: Path) -> None:
    """A file of weights for each kind, written anew as each of its seeds is trained. normalised: see `normalisation`.

    Raises EvidenceError.
    """
    sizes = [job.seen.nbytes + job.targets.nbytes for job in jobs]
    print(f"{len(jobs)} policies, {min(workers, len(jobs))} at a time, each with {max(sizes) / 1e6:.0f} MB at most")
    found: dict[str, dict[int, dict[str, npt.NDArray[Any]]]] = {}
    for kind, seed, loss, weights in in_processes(train_job, jobs, workers, prepare):
        print(f"{kind.name}, seed {seed}: loss {loss:.4f}", flush=True)
        by_seed = found.setdefault(kind.name, {})
        by_seed[seed] = weights
        _save(weights_file(folder, kind.name), kind, normalised, by_seed)


def _compact(targets: Tensor) -> npt.NDArray[Any]:
    """Tokens in int16, which hold all that a policy can say: each process is sent its own."""
    return targets.numpy() if targets.is_floating_point() else targets.numpy().astype(np.int16)


def _settings(config: PolicyConfig, name: str) -> dict[str, Any]:
    return asdict(replace(config, shown=SHOWN.get(name)))


def _length(kind: PolicyKind) -> int:
    return 0 if kind.vocabulary is None else kind.size


def targets_of(
    recordings: Sequence[Recording], lessons: Lessons, recipe: NetworkRecipe | None, folder: Path
) -> dict[str, tuple[int | None, Tensor]]:
    """What each kind of policy says for every chunk, by name: a vocabulary, and one row for each chunk.

    recipe: of OAT, which is trained here where the folder does not have it; None leaves it out. Raises EvidenceError.
    """
    chunks = meant(recordings)
    found: dict[str, tuple[int | None, Tensor]] = {ACTIONS: (None, chunks.flatten(1).float())}
    found |= {name: (lessons.vocabularies[name], tokens) for name, tokens in lessons.tokens.items()}
    if recipe is not None:
        path = folder / OAT_FILE
        if not path.exists():
            _train_oat(recordings, recipe, path)
        # What is decoded later is what is encoded now.
        tokens = load_oat(path, "cuda" if torch.cuda.is_available() else "cpu")
        found[OAT] = (tokens.vocabulary, tokens.encode(chunks))
    return found


def _train_oat(recordings: Sequence[Recording], recipe: NetworkRecipe, path: Path) -> None:
    print(f"{OAT}: {recipe.steps} steps", flush=True)
    fitted, held_out = (meant(part).float() for part in parts_of(recordings))
    network = oat_tokens(fitted, held_out, OAT_REGISTERS[-1], recipe).network
    write_tensors(path, {name: value.to(_KEPT).cpu().contiguous() for name, value in network.state_dict().items()}, {})


def load_oat(path: Path, device: str = "cpu") -> NetworkTokens:
    """What was trained before. Raises EvidenceError."""
    network = OatNetwork(OatConfig(CHUNK_LENGTH, OAT_REGISTERS, dropout=0.0), ACTION_DIM)
    try:
        network.load_state_dict(load_safetensors(path.read_bytes())[0])
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise EvidenceError(f"{path} holds no {OAT}: {error}; delete it, and train again") from error
    return NetworkTokens(OAT, network.vocabulary, network.eval().to(device))


def weights_file(folder: Path, name: str) -> Path:
    """Of the policies that say these tokens."""
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, error=EvidenceError) as temporary:
        temporary.write_bytes(safetensors.torch.save(dict(tensors), {"policies": json.dumps(facts)}))


def _save(
    path: Path,
    kind: PolicyKind,
    normalised: tuple[Tensor, Tensor],
    by_seed: Mapping[int, Mapping[str, npt.NDArray[Any]]],
) -> None:
    tensors = dict(zip(("mean", "deviation"), normalised, strict=True))
    for seed, weights in by_seed.items():
        tensors |= {f"{seed}.{name}": torch.from_numpy(value) for name, value in weights.items()}
    write_tensors(path, tensors, asdict(kind))


def load_policies(path: Path) -> SeeingPolicies:
    """What `train_all` wrote, in float32 on the CPU. Raises EvidenceError."""
    try:
        tensors, metadata = load_safetensors(path.read_bytes())
        kind = PolicyKind(**json.loads(metadata["policies"]))
        config = PolicyConfig(**kind.config)
        mean, deviation = tensors.pop("mean"), tensors.pop("deviation")
        by_seed = {}
        for seed in _seeds(tensors):
            policy = policy_of(kind.context_size, kind.vocabulary, kind.size, config)
            own = {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith(f"{seed}.")}
            policy.load_state_dict(own)
            by_seed[seed] = policy.eval()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        raise EvidenceError(f"{path} holds no policies: {error}; train them first") from error
    return SeeingPolicies(kind, mean, deviation, by_seed)


def _seeds(names: Iterable[str]) -> list[int]:
    return sorted({int(name.partition(".")[0]) for name in names})
