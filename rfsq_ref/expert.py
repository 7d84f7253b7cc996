"""What all scripted experts have in common: phases, the style of an episode, and one contract.

An expert looks at one observation and answers one action of the OSC_POSE delta controller, 7 values in [-1, 1]:
dx dy dz (1 = 0.05 m), droll dpitch dyaw (world-frame rotation vector, 1 = 0.5 rad), gripper (negative opens,
positive closes). It works closed-loop: every target is computed from the current observation, so it also corrects
what a lossy tokenizer between it and the robot does to its actions. Only numpy is needed; the simulator is not.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from rfsq.rfsq_ref.expert_poses import (
    Array,
    Observation,
    Target,
    gripper_position,
    gripper_rotation,
    limited,
    rotation_vector,
)

POSITION_UNIT = 0.05
"""Metres that one unit of dx, dy or dz asks for."""
ROTATION_UNIT = 0.5
"""Radians that one unit of droll, dpitch or dyaw asks for."""
ACTION_DIM = 7


@dataclass(frozen=True)
class Phase:
    """One part of a task: go towards `target` until it is reached or time is up.

    Tolerances are in m and rad, steps are control steps (20 per second), `speed` and `noise` scale the episode's
    own speed limit and noise level. `until` replaces the tolerances as the condition to go on.
    """

    name: str
    target: Target
    closed: bool
    position_tolerance: float = 0.01
    rotation_tolerance: float = 0.1
    min_steps: int = 1
    max_steps: int = 90
    speed: float = 1.0
    noise: float = 1.0
    until: Callable[[Observation], bool] | None = None


@dataclass(frozen=True)
class Style:
    """How one episode is driven; sampled per episode so that demonstrations differ as those of people do.

    Gains are the fraction of the remaining error asked for per step; limits and noise are in action units.
    """

    position_gain: float
    rotation_gain: float
    position_limit: float
    rotation_limit: float
    gripper_level: float
    noise: float
    tilt: Array = field(repr=False)

    @classmethod
    def sample(cls, rng: np.random.Generator, noise_scale: float) -> "Style":
        return cls(
            position_gain=rng.uniform(0.45, 0.75),
            rotation_gain=rng.uniform(0.45, 0.75),
            position_limit=rng.uniform(0.6, 1.0),
            rotation_limit=rng.uniform(0.35, 0.7),
            gripper_level=rng.uniform(0.75, 0.98),
            noise=noise_scale * rng.uniform(0.03, 0.07),
            tilt=np.append(rng.normal(0.0, 0.18, 2), 0.0),
        )


class OrnsteinUhlenbeck:
    """Correlated noise [7] with unit standard deviation and a memory of about six steps."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._state = rng.standard_normal(ACTION_DIM)

    def step(self) -> Array:
        keep = 0.85
        self._state = keep * self._state + np.sqrt(1.0 - keep**2) * self._rng.standard_normal(ACTION_DIM)
        return self._state


class Expert(ABC):
    """Contract: `reset(rng)` once per episode, then `act(observation)` until `done`."""

    task: ClassVar[str]
    max_steps: ClassVar[int] = 450

    def __init__(self, noise_scale: float = 1.0) -> None:
        """`noise_scale` 0 switches the action noise off; the per-episode style stays."""
        self._noise_scale = noise_scale
        self._phases: tuple[Phase, ...] = ()
        self._index = 0

    def reset(self, rng: np.random.Generator) -> None:
        """Start a new episode; everything random about it comes from `rng`."""
        self.style = Style.sample(rng, self._noise_scale)
        self._phases = self.plan(rng)
        self._noise = OrnsteinUhlenbeck(rng)
        self._index = 0
        self._phase_steps = 0
        self._phase_start: Observation | None = None
        self._gripper = -self.style.gripper_level

    @abstractmethod
    def plan(self, rng: np.random.Generator) -> tuple[Phase, ...]:
        """The phases of one episode, with its random waypoints."""

    @property
    def done(self) -> bool:
        """Whether the last phase has ended."""
        return self._index >= len(self._phases)

    @property
    def phase(self) -> str:
        """Name of the phase that is under way, "done" after the last one."""
        return "done" if self.done else self._phases[self._index].name

    def act(self, observation: Observation) -> NDArray[np.float32]:
        """Action float32 [7] in [-1, 1] for this observation; after the end it holds the last phase's target."""
        if not self._phases:
            raise RuntimeError(f"{type(self).__name__}.act was called before reset(rng)")
        if self._phase_start is None:
            self._phase_start = dict(observation)
        phase = self._phases[min(self._index, len(self._phases) - 1)]
        pose = phase.target(observation, self._phase_start)
        position_error = pose.position - gripper_position(observation)
        rotation_error = rotation_vector(pose.rotation @ gripper_rotation(observation).T)
        action = self._command(phase, position_error, rotation_error)
        self._advance(phase, observation, position_error, rotation_error)
        return action

    def _command(self, phase: Phase, position_error: Array, rotation_error: Array) -> NDArray[np.float32]:
        style = self.style
        move = limited(style.position_gain * position_error / POSITION_UNIT, style.position_limit * phase.speed)
        turn = limited(style.rotation_gain * rotation_error / ROTATION_UNIT, style.rotation_limit * phase.speed)
        goal = style.gripper_level if phase.closed else -style.gripper_level
        self._gripper += 0.6 * (goal - self._gripper)
        clean = np.concatenate([move, turn, [self._gripper]])
        noisy = clean + phase.noise * style.noise * self._noise.step()
        return np.clip(noisy, -1.0, 1.0).astype(np.float32)

    def _advance(self, phase: Phase, observation: Observation, position_error: Array, rotation_error: Array) -> None:
        if self.done:
            return
        self._phase_steps += 1
        if phase.until is not None:
            reached = phase.until(observation)
        else:
            near = float(np.linalg.norm(position_error)) < phase.position_tolerance
            reached = near and float(np.linalg.norm(rotation_error)) < phase.rotation_tolerance
        if (reached and self._phase_steps >= phase.min_steps) or self._phase_steps >= phase.max_steps:
            self._index += 1
            self._phase_steps = 0
            self._phase_start = None
