"""A policy around the adapter, and what two processes do with it that train together."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from rfsq.runtime import FingerprintError
from rfsq.runtime.policy.adapter import ActionRFSQAE

FULL = StateDictOptions(full_state_dict=True)


class Policy(nn.Module):
    """Learns something from what the tokenizer gives back."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tokenizer = ActionRFSQAE.from_bundle(path)
        self.head = nn.Linear(self.tokenizer.action_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        recon, _ = self.tokenizer(x)
        return self.head(recon).square().mean()


def trained(model: nn.Module, x: Tensor, steps: int = 3) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_together(rank: int, meeting_point: Path, path: Path, other: Path, report: Path) -> None:
    """As rank 0 or 1 of two: everything in one go, because starting them takes the longest."""
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    x = 0.3 * torch.rand(2, 2, 3)
    found = []

    policy = Policy(path)
    policy.requires_grad_(True)
    trained(DistributedDataParallel(policy), x)
    found.append("DDP")

    # The first process hands its state to the others.
    unlike = Policy(other if rank else path)
    DistributedDataParallel(unlike)
    try:
        unlike.tokenizer.encode(x)
        found.append("own tokenizer")
    except FingerprintError as error:
        names = (policy.tokenizer.fingerprint, unlike.tokenizer.fingerprint)
        found.append(f"another tokenizer refused, {sum(name in str(error) for name in names)} named")

    policy = Policy(path)
    policy.requires_grad_(True)
    fully_shard(policy)
    trained(policy, x)
    state = get_model_state_dict(policy, options=FULL)
    set_model_state_dict(policy, dict(state), options=FULL)
    trained(policy, x)
    found.append("FSDP2")

    with torch.device("meta"):
        policy = Policy(path)
    fully_shard(policy)
    policy.to_empty(device="cpu")
    set_model_state_dict(policy, dict(state), options=FULL)
    trained(policy, x)
    found.append("FSDP2 from meta")

    policy = Policy(path)
    policy.requires_grad_(True)
    trained(FullyShardedDataParallel(policy, device_id=torch.device("cpu")), x)
    found.append("FSDP1")

    report.with_suffix(f".{rank}").write_text("\n".join(found))
    dist.destroy_process_group()
