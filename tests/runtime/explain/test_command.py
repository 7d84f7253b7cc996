"""The command `explain`: what it writes, what it says, and what it refuses."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from rfsq.runtime.bundle.fidelity import Grade
from rfsq.runtime.explain import command
from rfsq.runtime.explain.measure import Explanation
from tests.runtime.datasets.samples import write_info, write_lerobot_v3


def run(*arguments: object) -> int:
    return command.main([str(argument) for argument in arguments])


def test_it_says_what_each_budget_costs_and_where_the_page_is(
    chunk_bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(chunk_bundle, "--data", data, "--output", tmp_path / "page.html") == 0
    *rows, unit, grades, verdict = capsys.readouterr().out.splitlines()
    assert [row.split(" RMS")[0].split() for row in rows] == [
        [bits, "bits", "a", "step", count, what, grade]
        for bits, count, what, grade in (
            ("2", "1", "token", "worthless"),
            ("10", "5", "tokens", "poor"),
            ("18", "9", "tokens", "poor"),
        )
    ]
    assert unit.startswith("errors are in normalised units: 1 is half of the range")
    assert grades.startswith("good: no dimension loses more than 1% of its variance; poor: one does")
    # The constants are random.
    page = tmp_path / "page.html"
    assert verdict == f"✓ {page}: 9 chunks shown, 9 counted; all 9 tokens are poor on these data"


def test_it_says_from_how_many_on_they_are_good() -> None:
    good, poor, worthless = Grade.GOOD, Grade.POOR, Grade.WORTHLESS
    for grades, said in (
        ((worthless, poor, good, good), "good from 4 tokens on"),
        # Good by chance, and not with more.
        ((good, poor, good, good), "good from 4 tokens on"),
        ((good, good, good, good), "good from 1 token on"),
        ((poor, good, good, poor), "all 8 tokens are poor on these data"),
    ):
        found = SimpleNamespace(prefixes=(1, 2, 4, 8), grades=grades)
        assert command._judged(cast(Explanation, found), "tokens") == said


def test_names_come_from_the_data_and_millimetres_say_of_what(
    chunk_bundle: Path, episodes: list[np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, page = write_lerobot_v3(tmp_path / "robot", episodes), tmp_path / "page.html"
    given = [chunk_bundle, "--data", folder, "--output", page, "--overwrite", "--position-unit", 0.05]
    for names, said in (
        (["pan", "lift", "grip"], "pan, lift, grip"),
        ({"motors": ["pan", "lift", "grip"]}, "pan, lift, grip"),
        (["pan", "lift"], "dim 0, dim 1, dim 2"),
        (None, "dim 0, dim 1, dim 2"),
        ([["pan", "lift", "grip"]], "pan, lift, grip"),
        ([[["pan", "lift", "grip"]]], "dim 0, dim 1, dim 2"),
    ):
        write_info(folder, "v3.0", episodes, features={"action": {"names": names}})
        assert run(*given) == 0
        assert f"millimetres: {said} are taken as x, y and z, where 1 is 0.05 m" in capsys.readouterr().out
        assert f'"names":{json.dumps(said.split(", "), separators=(",", ":"))}' in page.read_text()
    assert run(*given, "--names", "x,y,z") == 0
    assert "millimetres: x, y, z are taken" in capsys.readouterr().out


def test_actions_beyond_the_range_are_warned_of_and_dimensions_have_the_names_of_the_data(
    chunk_bundle: Path, episodes: list[np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_lerobot_v3(tmp_path / "robot", episodes)
    column = {"dtype": "float32", "shape": [3], "names": ["pan", "lift", "gripper"]}
    write_info(folder, "v3.0", episodes, features={"action": column})
    assert run(chunk_bundle, "--data", folder, "--output", tmp_path / "page.html") == 0
    assert "WARNING" not in capsys.readouterr().out
    assert '"names":["pan","lift","gripper"]' in (tmp_path / "page.html").read_text(encoding="utf-8")
    # Past the last whole chunk, where no sample looks.
    episodes[0][-1, 1] = 40
    folder = write_lerobot_v3(tmp_path / "far", episodes)
    write_info(folder, "v3.0", episodes, features={"action": column})
    assert run(chunk_bundle, "--data", folder, "--output", tmp_path / "far.html") == 0
    assert "dimension 1 (lift) runs from " in capsys.readouterr().out


def test_its_document_has_every_prefix(
    bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(bundle, "--data", data, "--episode", 0, "--output", tmp_path / "page.html", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["prefix"] for row in document["prefixes"]] == [2, 3]
    assert [chunk["step"] for chunk in document["shown"]] == [0, 2, 4, 6, 8, 10, 12]
    assert document["output"] == str(tmp_path / "page.html")


def test_a_page_that_is_there_stays(chunk_bundle: Path, data: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("mine")
    assert run(chunk_bundle, "--data", data, "--output", page) == 2
    assert page.read_text() == "mine"
    assert run(chunk_bundle, "--data", data, "--output", page, "--overwrite") == 0
    assert page.read_text() != "mine"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--names", "x,y"], "--names has 2 names, and actions have 3 dimensions; expected a name for each"),
        (["--names", "x,,z"], "--names has 3 names, empty ones among them, and actions have 3 dimensions"),
        (["--episode", "9"], "--episode 9 is not in the data"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_written(
    options: list[str], said: str, chunk_bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(chunk_bundle, "--data", data, "--output", tmp_path / "page.html", *options) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("unit", ["0", "-1", "inf", "nan", "wide"])
def test_a_unit_that_is_no_length_is_refused(unit: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run("bundle", "--data", "data.npz", f"--position-unit={unit}")
    assert f"'{unit}' is no length; expected metres, such as 0.05" in capsys.readouterr().err
