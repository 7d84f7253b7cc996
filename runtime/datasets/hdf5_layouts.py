"""Where HDF5 files of demonstrations keep their episodes.

- robomimic, LIBERO, Isaac Lab: data/demo_N/actions, with filter keys such as mask/train
- the same without the group: demo_N/action, and traj_N/actions, as ManiSkill writes it
- ALOHA: one episode in a file, /action beside /observations
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..bundle.paths import shortlist
from .array_layouts import AS_FLOATS, numbered_alike, require_equal, require_one_way, unfit
from .errors import SourceError
from .hdf5_storage import follow, require_stored
from .source_base import in_order, natural, optional

#: Usual names of the action array.
ACTION_NAMES = ("actions", "action")
EXPECTED = "expected data/demo_N/actions, demo_N/actions, traj_N/actions, or action beside observations"

_NUMBERED = re.compile(r".*\d")
# Arrays that say where episodes end, where many lie in one array.
_ENDS = ("terminals", "timeouts", "dones", "episode_ends")


@dataclass(frozen=True)
class FoundEpisode:
    """name: of its group, "" where the file is the episode; place: of the action array, [steps, width], in the file;
    file: the number of the file, where there are several."""

    name: str
    place: str
    steps: int
    width: int
    file: int = 0


def find_episodes(file: Any, name: str, key: str | None = None, filter_key: str | None = None) -> list[FoundEpisode]:
    """The episodes of an open file in natural order, at least one, with actions that can be read; none are read here.

    name: of the file, for messages; key: of the action array, as a path within an episode; filter_key: of robomimic,
    to take the episodes that it lists alone. Raises SourceError.
    """
    h5py = optional("h5py")
    keys = ACTION_NAMES if key is None else (key,)

    def array_in(group: Any, place: str) -> tuple[str, int, int] | None:
        """Name, steps and width of the action array in a group at this place, if there is one."""
        found = {wanted: follow(group, wanted, name) for wanted in keys if group}
        arrays = {wanted: array for wanted, array in found.items() if isinstance(array, h5py.Dataset)}
        for wanted, array in arrays.items():
            _check_actions(array, f"{name}, {place}{wanted}")
        same = require_equal(
            keys, arrays, f"{name}, {place}".rstrip(", /"), lambda one, other: _are_equal(arrays[one], arrays[other])
        )
        return (same[0], *arrays[same[0]].shape) if same else None

    whole, data = array_in(file, ""), follow(file, "data", name)
    inside = list(data) if isinstance(data, h5py.Group) else None
    numbered = [member for member in sorted(file, key=natural) if _NUMBERED.fullmatch(member)]
    groups = {member: found for member in numbered if isinstance(found := follow(file, member, name), h5py.Group)}
    outside = {member: array_in(group, f"{member}/") for member, group in groups.items()}
    with_actions = [member for member, array in outside.items() if array]
    require_one_way([whole[:1] if whole else (), with_actions, [f"data/{member}" for member in inside or ()]], name)
    if whole:
        _require_one_episode(file, name, whole[0], filter_key)
        return [FoundEpisode("", *whole)]
    if inside is None and not with_actions:
        found = next((f"; {member} holds {shortlist(group) or 'nothing'}" for member, group in groups.items()), "")
        raise SourceError(
            f"{name} holds {shortlist(file) or 'nothing'}{found}; {EXPECTED}: name the action array with --key where "
            "it is called otherwise"
        )
    container, prefix = (file, "") if inside is None else (data, "data/")
    members = in_order(outside if inside is None else inside, name)
    if not members:
        raise SourceError(f"{name} holds no episodes; {EXPECTED}")
    require_one_way(numbered_alike(members), name)
    episodes = []
    for member in members if filter_key is None else _filtered(file, name, members, filter_key):
        group = follow(container, member, name)
        group = group if isinstance(group, h5py.Group) else {}
        array = outside[member] if inside is None else array_in(group, f"data/{member}/")
        if array is None:
            raise SourceError(
                f"{name}, {prefix}{member} has no {'action array' if key is None else repr(key)}; found "
                f"{shortlist(group) or 'nothing'}; expected `actions` or `action`: name the right one with --key"
            )
        place, steps, width = array
        episodes.append(FoundEpisode(member, f"{prefix}{member}/{place}", steps, width))
    return episodes


def _require_one_episode(file: Any, name: str, place: str, filter_key: str | None) -> None:
    """place: of the action array. Raises SourceError where an array beside it says where episodes end."""
    ends = [end for end in _ENDS if end in set(file)]
    if ends:
        raise SourceError(
            f"{name} has many episodes in one row ({place} beside {', '.join(ends)}); expected one for each file "
            "or group: cut them apart and save each as demo_N/actions"
        )
    if filter_key:
        raise SourceError(f"{name} is one episode, and has no filter keys; leave --filter-key out")


def _check_actions(array: Any, where: str) -> None:
    require_stored(array, where)
    if array.dtype.kind != "f" or array.ndim != 2 or not array.size:
        raise unfit(where, array, f"floating-point numbers [steps, action dimensions], at least one step{AS_FLOATS}")


def _are_equal(one: Any, other: Any) -> bool:
    return one.shape == other.shape and np.array_equal(one[()], other[()], equal_nan=True)


def _filtered(file: Any, name: str, members: list[str], filter_key: str) -> list[str]:
    """The members that the filter lists, in natural order. Raises SourceError."""
    masks = follow(file, "mask", name) or {}
    wanted = filter_key.removeprefix("mask/")
    if wanted not in list(masks):
        raise SourceError(
            f"{name} has no filter key {wanted!r}; found {shortlist(masks) or 'none'}: choose one of them with "
            "--filter-key (filter_key=), or leave it out"
        )
    mask = follow(masks, wanted, name)
    if not isinstance(mask, optional("h5py").Dataset):
        raise SourceError(f"{name}, mask/{wanted} is a group; expected a list of names: choose another filter key")
    require_stored(mask, f"{name}, mask/{wanted}")
    listed = np.asarray(mask[()]).ravel().tolist()
    names = Counter(entry.decode(errors="replace") if isinstance(entry, bytes) else str(entry) for entry in listed)
    missing = sorted(names.keys() - set(members), key=natural)
    twice = [member for member, count in names.items() if count > 1]
    if missing or twice or not names:
        found = f"lists {shortlist(missing)}, which are not in the file" if missing else "lists no episodes"
        found = f"lists {shortlist(twice)} more than once" if twice and not missing else found
        raise SourceError(f"{name}: the filter key {wanted!r} {found}; choose another, or write the file anew")
    return [member for member in members if member in names]
