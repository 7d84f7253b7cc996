"""Errors of decoded actions in normalised units, millimetres, degrees and gripper commands; entropy of tokens."""

import numpy as np
import numpy.typing as npt
from scipy.spatial.transform import Rotation

from rfsq.evidence.settings import OscPose

Array = npt.NDArray[np.float64]


def action_errors(
    expected: npt.NDArray[np.floating], decoded: npt.NDArray[np.floating], units: Array, physical: OscPose | None
) -> dict[str, float]:
    """Errors by name, over all steps (and arms). expected, decoded: [N, A] in the robot's own units.

    action_mse, max_error: in `units` [A], what counts as 1 in each dimension. Where OSC_POSE units apply also
    position_mm, rotation_deg: mean distance between the motion asked for and the one decoded, and its 99th percentile,
    position_mm_p99 and rotation_deg_p99; gripper_sign_errors: share of steps that open instead of closing or the
    reverse.
    """
    difference = (decoded.astype(np.float64) - expected.astype(np.float64)) / units
    found = {"action_mse": float(np.mean(difference**2)), "max_error": float(np.abs(difference).max())}
    if physical is None:
        return found
    wanted, given = physical.arms(expected), physical.arms(decoded)
    position = 1e3 * physical.position_m * np.linalg.norm(given[..., :3] - wanted[..., :3], axis=-1)
    rotation = rotation_distance_deg(physical.rotation_rad * wanted[..., 3:6], physical.rotation_rad * given[..., 3:6])
    for name, distance in (("position_mm", position), ("rotation_deg", rotation)):
        found |= {name: float(distance.mean()), f"{name}_p99": float(np.quantile(distance, 0.99))}
    return found | {"gripper_sign_errors": float(((wanted[..., 6] > 0) != (given[..., 6] > 0)).mean())}


def rotation_distance_deg(first: Array, second: Array) -> Array:
    """Angle of the rotation between two rotation vectors [..., 3] in rad; [...] in degrees, at most 180."""
    relative = Rotation.from_rotvec(first.reshape(-1, 3)).inv() * Rotation.from_rotvec(second.reshape(-1, 3))
    angle: Array = np.degrees(relative.magnitude()).reshape(first.shape[:-1])
    return angle


def level_counts(tokens: npt.NDArray[np.integer], num_levels: int) -> npt.NDArray[np.int64]:
    """How often each latent of a layer takes each level: tokens [N, D] to [D, K]."""
    return np.stack([np.bincount(column, minlength=num_levels) for column in tokens.T])


def entropy_bits(counts: npt.NDArray[np.integer]) -> Array:
    """Shannon's -Σ p log2 p of counts [..., K] along the last axis, in bits: [...], each at most log2 K.

    >>> entropy_bits(np.array([[1, 1, 1, 1], [8, 0, 0, 0]])).tolist()
    [2.0, 0.0]
    """
    share = counts / counts.sum(axis=-1, keepdims=True)
    logarithm = np.log2(share, out=np.zeros_like(share), where=share > 0)
    # The sum of one level alone is -0.
    bits: Array = np.maximum(-(share * logarithm).sum(axis=-1), 0.0)
    return bits


def units_of(actions: npt.NDArray[np.float32]) -> Array:
    """What counts as 1 in each dimension of actions [N, A]: 1 where all lie in [-1, 1] as controllers take them.

    Elsewhere half the range, so that metres, radians and counts weigh alike; 1 for a dimension that never moves.
    """
    if np.abs(actions).max() <= 1:
        return np.ones(actions.shape[1])
    values = actions.astype(np.float64)
    half = (values.max(axis=0) - values.min(axis=0)) / 2
    resolution = np.finfo(np.float32).eps * np.abs(values).max(axis=0)
    return np.where(half > np.maximum(resolution, np.finfo(np.float32).tiny), half, 1.0)
