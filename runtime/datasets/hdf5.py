"""HDF5 files of demonstrations, one or a folder of them, and where they keep their episodes.

- robomimic, LIBERO, Isaac Lab: data/demo_N/actions, with filter keys such as mask/train
- the same without the group: demo_N/action, and traj_N/actions, as ManiSkill writes it
- ALOHA: one episode in a file, /action beside /observations
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.arrays import Int64Array
from ..bundle.paths import shortlist
from .array_layouts import AS_FLOATS, BORDER_NAMES, numbered_alike, require_equal, require_one_way, unfit
from .errors import SourceError
from .source_base import (
    EpisodeTable,
    Source,
    StepReader,
    Steps,
    as_float32,
    in_order,
    natural,
    opened,
    optional,
    require_stated,
    shown_name,
    visible_files,
)

HDF5_SUFFIXES = (".hdf5", ".h5")
_KIND, _MAGIC = "an HDF5 file", b"\x89HDF"
#: Usual names of the action array.
_ACTION_NAMES = ("actions", "action")
_EXPECTED = "expected data/demo_N/actions, demo_N/actions, traj_N/actions, or action beside observations"

_NUMBERED = re.compile(r".*\d")
# Arrays that say where episodes end, where many lie in one array.
_ENDS = ("terminals", "timeouts", "dones", *BORDER_NAMES)
_MOST_LINKS = 15
_ONE_FILE = (
    "expected all in this file, since it alone is checked and recorded: where nothing is missing, copy all into a new "
    "one with h5py (new[PLACE] = old[PLACE][()])"
)


@dataclass(frozen=True)
class _FoundEpisode:
    """name: of its group, "" where the file is the episode; place: of the action array, [steps, width], in the file;
    file: the number of the file, where there are several."""

    name: str
    place: str
    steps: int
    width: int
    file: int = 0


class _Hdf5Reader(StepReader):
    _source: Hdf5Source

    def _open(self, index: int) -> Any:
        file = self._source.files[index].name
        path = self._source.root / file
        with opened(path, _KIND, _MAGIC, name=file):
            return optional("h5py").File(path, "r")

    def _read(self, piece: int, start: int, stop: int) -> Steps:
        source, first = self._source, int(self._source.first_rows[piece])
        episode = source.episodes[piece]
        values = self._at(episode.file)[episode.place][start - first : stop - first]
        return source.table.steps(as_float32(values), start)


@dataclass(frozen=True, eq=False, kw_only=True)
class Hdf5Source(Source):
    """episodes: where they are in the files, [E]; file_tasks: one for each file."""

    kind = _KIND
    reader = _Hdf5Reader
    episodes: tuple[_FoundEpisode, ...]
    file_tasks: tuple[str, ...]

    @cached_property
    def table(self) -> EpisodeTable:
        return EpisodeTable(self.first_rows, np.arange(len(self.episodes), dtype=np.int64))

    def file_of(self, row: int) -> str:
        episode = self.episodes[self.piece_of(row)]
        return ", ".join(filter(None, (self.files[episode.file].name, episode.place.rpartition("/")[0])))

    def episode_names(self, episodes: Int64Array) -> list[str]:
        files = [shown_name(Path(file.name).with_suffix("")) for file in self.files]
        chosen = (self.episodes[number] for number in episodes.tolist())
        return [f"{files[episode.file]}/{episode.name}".rstrip("/") for episode in chosen]

    def tasks(self, episodes: EpisodeTable) -> list[str]:
        return [self.file_tasks[self.episodes[number].file] for number in episodes.numbers.tolist()]


def hdf5_files(folder: Path) -> list[Path]:
    return visible_files(folder, (path for path in folder.iterdir() if path.suffix.lower() in HDF5_SUFFIXES))


def open_hdf5(path: Path, key: str | None, filter_key: str | None = None) -> Hdf5Source:
    """One file, or a folder of them in natural order; episodes are numbered from 0 in this order."""
    h5py = optional("h5py")
    paths = hdf5_files(path) if path.is_dir() else [path]
    episodes: list[_FoundEpisode] = []
    tasks: list[str] = []
    for index, one in enumerate(paths):
        with opened(one, _KIND, _MAGIC), h5py.File(one, "r") as file:
            found = _find_episodes(file, one.name, key, filter_key)
            data = _follow(file, "data", one.name)
            # ALOHA has a folder for each task.
            tasks.append(_task((file if data is None else data).attrs, one if found[0].name else one.parent))
        episodes += [replace(episode, file=index) for episode in found]
    pieces = [(found.steps, found.width, f"{paths[found.file].name}, {found.place}") for found in episodes]
    return Hdf5Source.from_pieces(path, paths, pieces, episodes=tuple(episodes), file_tasks=tuple(tasks))


def _task(attributes: Mapping[str, Any], path: Path) -> str:
    """LIBERO's instruction, else robomimic's environment, else the file's name."""
    for attribute, name in (("problem_info", "language_instruction"), ("env_args", "env_name")):
        with suppress(KeyError, TypeError, ValueError):
            task = json.loads(attributes[attribute])[name]
            # Some LIBERO files hold the instruction as a list of words, some in quotation marks.
            return (task if isinstance(task, str) else " ".join(task)).strip().strip('"')
    return path.stem.removesuffix("_demo")


# Layouts --------------------------------------------------------------------------------------------------------------


def _find_episodes(file: Any, name: str, key: str | None, filter_key: str | None) -> list[_FoundEpisode]:
    """The episodes of an open file in natural order, at least one, with actions that can be read; none are read here.

    name: of the file, for messages; key: of the action array, as a path within an episode; filter_key: of robomimic,
    to take the episodes that it lists alone. Raises SourceError.
    """
    h5py = optional("h5py")
    keys = _ACTION_NAMES if key is None else (key,)

    def array_in(group: Any, place: str) -> tuple[str, int, int] | None:
        """Name, steps and width of the action array in a group at this place, if there is one."""
        found = {wanted: _follow(group, wanted, name) for wanted in keys if group}
        arrays = {wanted: array for wanted, array in found.items() if isinstance(array, h5py.Dataset)}
        for wanted, array in arrays.items():
            _check_actions(array, f"{name}, {place}{wanted}")
        same = require_equal(
            keys, arrays, f"{name}, {place}".rstrip(", /"), lambda one, other: _are_equal(arrays[one], arrays[other])
        )
        return (same[0], *arrays[same[0]].shape) if same else None

    whole, data = array_in(file, ""), _follow(file, "data", name)
    inside = list(data) if isinstance(data, h5py.Group) else None
    numbered = [member for member in sorted(file, key=natural) if _NUMBERED.fullmatch(member)]
    groups = {member: found for member in numbered if isinstance(found := _follow(file, member, name), h5py.Group)}
    outside = {member: array_in(group, f"{member}/") for member, group in groups.items()}
    with_actions = [member for member, array in outside.items() if array]
    require_one_way([whole[:1] if whole else (), with_actions, [f"data/{member}" for member in inside or ()]], name)
    if whole:
        _require_one_episode(file, name, whole[0], filter_key)
        return [_FoundEpisode("", *whole)]
    if inside is None and not with_actions:
        found = next((f"; {member} holds {shortlist(group) or 'nothing'}" for member, group in groups.items()), "")
        raise SourceError(
            f"{name} holds {shortlist(file) or 'nothing'}{found}; {_EXPECTED}: name the action array with --key where "
            "it is called otherwise"
        )
    container, prefix = (file, "") if inside is None else (data, "data/")
    members = in_order(outside if inside is None else inside, name)
    if not members:
        raise SourceError(f"{name} holds no episodes; {_EXPECTED}")
    require_one_way(numbered_alike(members), name)
    episodes = []
    for member in members if filter_key is None else _filtered(file, name, members, filter_key):
        group: Any = _follow(container, member, name)
        group = group if isinstance(group, h5py.Group) else {}
        array = outside[member] if inside is None else array_in(group, f"data/{member}/")
        if array is None:
            raise SourceError(
                f"{name}, {prefix}{member} has no {'action array' if key is None else repr(key)}; found "
                f"{shortlist(group) or 'nothing'}; expected `actions` or `action`: name the right one with --key"
            )
        place, steps, width = array
        stated = group.attrs.get("num_samples")
        require_stated(f"{name}, {prefix}{member} (num_samples)", stated, "steps", "its actions have", steps)
        episodes.append(_FoundEpisode(member, f"{prefix}{member}/{place}", steps, width))
    return episodes


def _require_one_episode(file: Any, name: str, place: str, filter_key: str | None) -> None:
    """place: of the action array. Raises SourceError where an array beside it says where episodes end."""
    ends = [end for end in _ENDS if _follow(file, end, name) is not None]
    if ends:
        raise SourceError(
            f"{name} has many episodes in one row ({place} beside {', '.join(ends)}); expected one for each file "
            "or group: cut them apart and save each as demo_N/actions"
        )
    if filter_key:
        raise SourceError(f"{name} is one episode, and has no filter keys; leave --filter-key out")


def _check_actions(array: Any, where: str) -> None:
    _require_stored(array, where)
    if array.dtype.kind != "f" or array.ndim != 2 or not array.size:
        raise unfit(where, array, f"floating-point numbers [steps, action dimensions], at least one step{AS_FLOATS}")


def _are_equal(one: Any, other: Any) -> bool:
    return one.shape == other.shape and np.array_equal(one[()], other[()], equal_nan=True)


def _filtered(file: Any, name: str, members: list[str], filter_key: str) -> list[str]:
    """The members that the filter lists, in natural order. Raises SourceError."""
    masks = _follow(file, "mask", name) or {}
    wanted = filter_key.removeprefix("mask/")
    if wanted not in list(masks):
        raise SourceError(
            f"{name} has no filter key {wanted!r}; found {shortlist(masks) or 'none'}: choose one of them with "
            "--filter-key (filter_key=), or leave it out"
        )
    mask = _follow(masks, wanted, name)
    if not isinstance(mask, optional("h5py").Dataset):
        raise SourceError(f"{name}, mask/{wanted} is a group; expected a list of names: choose another filter key")
    _require_stored(mask, f"{name}, mask/{wanted}")
    listed = np.asarray(mask[()]).ravel().tolist()
    names = Counter(entry.decode(errors="replace") if isinstance(entry, bytes) else str(entry) for entry in listed)
    missing = sorted(names.keys() - set(members), key=natural)
    twice = [member for member, count in names.items() if count > 1]
    if missing or twice or not names:
        found = f"lists {shortlist(missing)}, which are not in the file" if missing else "lists no episodes"
        found = f"lists {shortlist(twice)} more than once" if twice and not missing else found
        raise SourceError(f"{name}: the filter key {wanted!r} {found}; choose another, or write the file anew")
    return [member for member in members if member in names]


# What a file holds itself: HDF5 also opens other files, and gives zeros for missing data ------------------------------


def _follow(group: Any, path: str, name: str, most: int = _MOST_LINKS) -> Any:
    """The object at this path from a group, None where there is none; nothing outside of the file is opened.

    name: of the file, for messages; most: how many links may be followed. Raises SourceError for a link to another
    file, and for one that leads nowhere.
    """
    h5py = optional("h5py")
    found = group
    for place in filter(lambda part: part not in ("", "."), path.split("/")):
        if not isinstance(found, h5py.Group):
            return None
        # The same as `get(place, getlink=True)`, but faster.
        links, encoded = found.id.links, place.encode("utf-8", "surrogateescape")
        if not links.exists(encoded):
            return None
        if links.get_info(encoded).type == h5py.h5l.TYPE_HARD:
            found = found[place]
            continue
        target = found.get(place, getlink=True)
        link = f"{name}, {found.name.rstrip('/')}/{place} is a link to {target.path!r}".replace(", /", ", ")
        if isinstance(target, h5py.ExternalLink):
            raise SourceError(f"{link} in another file, {target.filename!r}; {_ONE_FILE}")
        if not most:
            raise SourceError(f"{link}, and so on without an end; expected an array or a group: write the file anew")
        found = _follow(found.file["/"] if target.path.startswith("/") else found, target.path, name, most - 1)
        if found is None:
            raise SourceError(f"{link}, which is not in the file; expected what it leads to: write the file anew")
    return found


def _require_stored(array: Any, where: str) -> None:
    """Raises SourceError for an array whose numbers are not all in this file: HDF5 would give zeros for them."""
    if array.shape is None:
        raise SourceError(f"{where} is empty and has no shape; expected an array: remove it, or write the file anew")
    settings = array.id.get_create_plist()
    if settings.get_external_count() or array.is_virtual:
        sources = array.virtual_sources() if array.is_virtual else array.external
        names = sorted({source.file_name if array.is_virtual else str(source[0]) for source in sources})
        raise SourceError(f"{where} has its numbers elsewhere, in {', '.join(names)}; {_ONE_FILE}")
    if not array.size:
        return
    if array.chunks is None:
        missing = not array.id.get_storage_size()
    else:
        chunks = math.prod(-(-size // chunk) for size, chunk in zip(array.shape, array.chunks, strict=True))
        missing = array.id.get_num_chunks() < chunks
    if missing:
        raise SourceError(
            f"{where} has room for {list(array.shape)}, but not all was written; expected every step: the recording "
            "was not finished, remove this episode or record it again"
        )
