"""Where HDF5 files of demonstrations keep their episodes, as they are found in the wild.

- robomimic, LIBERO, Isaac Lab: data/demo_N/actions, with filter keys such as mask/train
- the same without the group: demo_N/action, and traj_N/actions, as ManiSkill writes it
- ALOHA: one episode in a file, /action beside /observations
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.dataset_errors import SourceError
from runtime.dataset_steps import natural
from runtime.paths import shortlist

#: How the action array is called, in order of preference, where nobody says it.
ACTION_NAMES = ("actions", "action")
EXPECTED = "expected data/demo_N/actions, demo_N/actions, traj_N/actions, or action beside observations"

_NUMBERED = re.compile(r".*\d")
# Where many episodes lie in one row, these say where they end.
_ENDS = ("terminals", "timeouts", "dones", "episode_ends")


@dataclass(frozen=True)
class FoundEpisode:
    """name: of its group, "" where the file is the episode; place: of the action array in the file."""

    name: str
    place: str


def find_episodes(
    file: Any, name: str, kinds: tuple[type, type], key: str | None = None, filter_key: str | None = None
) -> list[FoundEpisode]:
    """The episodes of an open file in natural order; nothing is read but their names.

    name: of the file, for messages; kinds: h5py's Group and Dataset; key: of the action array, as a path within an
    episode; filter_key: of robomimic, to take the episodes that it lists alone. Raises SourceError.
    """
    group_kind, array_kind = kinds
    keys = (key,) if key else ACTION_NAMES

    def array_in(group: Any) -> str | None:
        return next((wanted for wanted in keys if isinstance(group.get(wanted), array_kind)), None)

    container, prefix = file, ""
    if isinstance(file.get("data"), group_kind):
        container, prefix = file["data"], "data/"
        members = sorted(container, key=natural)
    elif (whole := array_in(file)) is not None:
        ends = [end for end in _ENDS if end in file]
        if ends:
            raise SourceError(
                f"{name} has many episodes in one row ({whole} beside {', '.join(ends)}); expected one for each file "
                "or group: cut them apart and save each as demo_N/actions"
            )
        if filter_key:
            raise SourceError(f"{name} is one episode, and has no filter keys; leave --filter-key out")
        return [FoundEpisode("", whole)]
    else:
        groups = [member for member in file if isinstance(file[member], group_kind)]
        members = sorted((member for member in groups if _NUMBERED.fullmatch(member)), key=natural)
        if not any(array_in(file[member]) for member in members):
            found = f"; {members[0]} holds {shortlist(file[members[0]]) or 'nothing'}" if members else ""
            raise SourceError(
                f"{name} holds {shortlist(file) or 'nothing'}{found}; {EXPECTED}: name the action array with --key "
                "(key=) where it is called otherwise"
            )
    chosen = members if filter_key is None else _filtered(file, name, members, filter_key)
    found_episodes = []
    for member in chosen:
        group = container[member] if isinstance(container[member], group_kind) else {}
        array = array_in(group)
        if array is None:
            raise SourceError(
                f"{name}, {prefix}{member} has no {repr(key) if key else 'action array'}; found "
                f"{shortlist(group) or 'nothing'}; expected `actions` or `action`: name the right one with --key (key=)"
            )
        found_episodes.append(FoundEpisode(member, f"{prefix}{member}/{array}"))
    return found_episodes


def _filtered(file: Any, name: str, members: list[str], filter_key: str) -> list[str]:
    """In natural order, as without a filter."""
    masks = file.get("mask") or {}
    wanted = filter_key.removeprefix("mask/")
    if wanted not in masks:
        raise SourceError(
            f"{name} has no filter key {wanted!r}; found {shortlist(masks) or 'none'}: choose one of them with "
            "--filter-key (filter_key=), or leave it out"
        )
    listed = np.asarray(masks[wanted][()]).ravel().tolist()
    names = {entry.decode(errors="replace") if isinstance(entry, bytes) else str(entry) for entry in listed}
    missing = sorted(names.difference(members), key=natural)
    if missing or not names:
        found = f"lists {shortlist(missing)}, which are not in the file" if missing else "lists no episodes"
        raise SourceError(f"{name}: the filter key {wanted!r} {found}; choose another, or write the file anew")
    return [member for member in members if member in names]
