"""What a policy that is driven in the simulator sees: poses of gripper and bodies, its own last chunk, and the task."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rfsq.calibration.chunk_windows import windows
from rfsq.evidence.policy_recordings import Recording

#: Near a body, and only there, millimetres count: distances are also seen through a tanh of this width, in m.
_NEAR = 0.03


def sight(poses: Tensor, past: Tensor, task: Tensor) -> Tensor:
    """float32 [n, C] of poses [n, P, 7], actions [n, T, A] of the last chunk, 0 before the first, and tasks [n, tasks],
    1 at its own.

    A body is seen from the gripper: where it is, how it is turned, and its yaw modulo a quarter turn, for cubes look
    alike then. What there is not is 0.
    """
    position, rotation = poses[:, 0, :3], _rotations(poses[:, :1, 3:])
    is_there = poses[:, 1:, 3:].square().sum(dim=2, keepdim=True) > 0
    offset = poses[:, 1:, :3] - position.unsqueeze(1)
    turned = _rotations(poses[:, 1:, 3:])
    yaw = 4 * (_yaw(turned) - _yaw(rotation)).unsqueeze(-1)
    height = poses[:, 1:, 2:3]
    seen = [offset, torch.tanh(offset / _NEAR), height, _columns(rotation.mT @ turned), yaw.cos(), yaw.sin()]
    bodies = torch.where(is_there, torch.cat(seen, dim=2), 0.0)
    parts = (position, _columns(rotation), bodies, past, task)
    return torch.cat([part.flatten(1) for part in parts], dim=1).float()


def _rotations(quaternions: Tensor) -> Tensor:
    """[..., 3, 3] of quaternions [..., 4], x y z w."""
    x, y, z, w = torch.nn.functional.normalize(quaternions, dim=-1).unbind(dim=-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def _columns(rotations: Tensor) -> Tensor:
    """The first two columns [..., 6], which say all of a rotation, and without a jump."""
    return rotations[..., :2].flatten(-2)


def _yaw(rotations: Tensor) -> Tensor:
    return torch.atan2(rotations[..., 1, 0], rotations[..., 0, 0])


def lessons(recordings: Sequence[Recording], tasks: Sequence[str], chunk_length: int) -> tuple[Tensor, Tensor]:
    """What is seen at each window of the recordings, float32 [n, C], and the chunk [n, T, A] that was meant there."""
    seen = []
    for recording in recordings:
        executed = np.concatenate(
            (np.zeros((chunk_length, recording.executed.shape[1]), np.float32), recording.executed)
        )
        past = windows([executed], chunk_length).reshape(len(executed) - chunk_length + 1, chunk_length, -1)
        count = max(1, len(recording.poses) - chunk_length + 1)
        named = task_mark(recording.task, tasks).expand(count, -1)
        seen.append(sight(torch.from_numpy(recording.poses[:count]), past[:count], named))
    meant = windows([recording.intended for recording in recordings], chunk_length)
    return torch.cat(seen), meant.reshape(len(meant), chunk_length, -1)


def task_mark(task: str, tasks: Sequence[str]) -> Tensor:
    """float32 [1, tasks]: 1 at the task."""
    return torch.tensor([[float(task == name) for name in tasks]])
