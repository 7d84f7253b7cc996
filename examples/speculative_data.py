"""What a policy would see of the shipped demonstrations, and what it should say: windows, cut by episode.

The demonstrations hold actions and the name of the task, and neither images nor where things lie. So the policy sees
its own last two chunks, how far the commands so far have led (which stands for the robot's state), the time, the task.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from rfsq.rfsq_ref.data import ActionDataset
from rfsq.runtime.torch_adapter import ActionRFSQAE, ChunkTokenizer

FloatArray = npt.NDArray[np.float32]
#: Chunks looked back at.
LOOK_BACK = 2


@dataclass(frozen=True)
class Eyes:
    """From what has been sent so far to a context; in training and in the loop the same. tasks: their names."""

    chunk_length: int
    units: FloatArray
    offset: FloatArray
    tasks: tuple[str, ...]

    @property
    def size(self) -> int:
        return (LOOK_BACK * self.chunk_length + 1) * len(self.units) + 2 + len(self.tasks)

    def see(self, sent: FloatArray, task: str) -> FloatArray:
        """sent: all actions [k, A] of this episode so far -> context [C]."""
        scaled = (sent - self.offset) / self.units
        last = np.zeros((LOOK_BACK * self.chunk_length, len(self.units)), np.float32)
        recent = scaled[-len(last) :]
        last[len(last) - len(recent) :] = recent
        way = scaled.sum(axis=0) / 10
        clock = (len(sent) / 100, float(not len(sent)))
        named = [float(task == name) for name in self.tasks]
        return np.concatenate((last.ravel(), way, clock, named)).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Windows:
    """context [N, C]; actions [N, T, A], what the demonstrator did then; before [N, T, A], the chunk before it;
    codes int64 [N, T, D, L], of actions, and codes_before, of before; of chunk tokens [N, L].
    """

    context: torch.Tensor
    actions: torch.Tensor
    before: torch.Tensor
    codes: torch.Tensor
    codes_before: torch.Tensor

    def __len__(self) -> int:
        return len(self.context)


def cut_windows(episodes: ActionDataset, eyes: Eyes, tokenizer: ActionRFSQAE | ChunkTokenizer, every: int) -> Windows:
    """One window each `every` steps; none reaches over the end of an episode."""
    length, contexts, actions, before = eyes.chunk_length, [], [], []
    for episode, task in zip(episodes.episodes, episodes.tasks, strict=True):
        # Before an episode the robot stands with its gripper as it is at the beginning.
        padded = np.concatenate((np.tile(start_of(episode), (length, 1)), episode))
        for step in range(0, len(episode) - length + 1, every):
            contexts.append(eyes.see(episode[:step], task))
            actions.append(episode[step : step + length])
            before.append(padded[step : step + length])
    chunk, chunk_before = torch.from_numpy(np.stack(actions)), torch.from_numpy(np.stack(before))
    # As training code around the published model gets its labels.
    _, codes = tokenizer(chunk)
    _, codes_before = tokenizer(chunk_before)
    return Windows(torch.from_numpy(np.stack(contexts)), chunk, chunk_before, codes, codes_before)


def start_of(episode: FloatArray) -> FloatArray:
    """The command that the robot obeys before an episode: no motion, the gripper, its last dimension, as it is."""
    start = np.zeros(episode.shape[1], np.float32)
    start[-1] = np.sign(episode[0, -1])
    return start


def most_frequent(codes: torch.Tensor, num_levels: int) -> torch.Tensor:
    """codes [N, T, D, L] -> the commonest level at every place, [T, D, L]."""
    counts = torch.stack([(codes == level).sum(dim=0) for level in range(num_levels)])
    return counts.argmax(dim=0)
