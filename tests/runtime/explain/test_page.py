"""The page needs nothing else, runs nothing that the data bring, and draws in a browser what its numbers say."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rfsq.runtime.explain import command
from rfsq.runtime.explain import page as page_module
from tests.runtime.datasets.samples import write_npz

HOSTILE = "<script>alert('&\"')</script>"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NODE = shutil.which("node")


class _Reader(HTMLParser):
    """Elements by their ids, tags that stay open, addresses, and the texts of styles and scripts."""

    VOID = frozenset({"meta", "input", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.addresses: list[str] = []
        self.policy = ""
        self.blocks: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag not in self.VOID:
            self.open.append(tag)
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"] or ""
        self.ids |= {given["id"] or ""} if "id" in given else set()
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "action", "style")]
        assert not [name for name, _ in attributes if name.startswith("on")]
        if tag in ("script", "style"):
            self.blocks.append((given.get("type") or tag, ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.blocks[-1] = (self.blocks[-1][0], self.blocks[-1][1] + data)
        else:
            self.text += data

    def data(self) -> Any:
        return json.loads(dict(self.blocks)["application/json"])


@pytest.fixture
def written(chunk_bundle: Path, data: Path, tmp_path: Path) -> str:
    output = tmp_path / "page.html"
    assert command.main([str(chunk_bundle), "--data", str(data), "--output", str(output), "-q"]) == 0
    return output.read_text(encoding="utf-8")


def test_the_page_is_whole_and_has_no_address(written: str) -> None:
    reader = _Reader(written)
    assert reader.open == []
    assert reader.addresses == []
    # The name of SVG, which nothing loads.
    assert re.findall(r"https?://[^\"' ]*", written) == ["http://www.w3.org/2000/svg"]
    assert [kind for kind, _ in reader.blocks] == ["style", "application/json", "script"]


def test_its_policy_lets_nothing_run_but_its_own_script(written: str) -> None:
    reader = _Reader(written)
    hashes = {kind: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for kind, text in reader.blocks}
    assert reader.policy == (
        f"default-src 'none'; style-src 'sha256-{hashes['style']}'; script-src 'sha256-{hashes['script']}'"
    )


def test_the_script_finds_every_element_that_it_looks_for(written: str) -> None:
    script = Path(page_module.__file__).with_name("page.js").read_text()
    wanted = {*re.findall(r'\bat\("([^"]+)"\)', script), *re.findall(r'\blegend\("([^"]+)"', script)}
    assert wanted >= {"amount", "chunk", "curves", "errors", "path"}
    assert wanted <= _Reader(written).ids


def test_every_field_has_a_label_and_every_drawing_a_role(written: str) -> None:
    for field in ("amount", "chunk"):
        assert f'<label for="{field}">' in written
    assert re.findall(r'<svg(?! id="[^"]+" role="img")', written) == []


def test_no_text_is_read_as_markup() -> None:
    script = Path(page_module.__file__).with_name("page.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", script)


def test_what_the_data_name_is_text(chunk_bundle: Path, episodes: list[np.ndarray], tmp_path: Path) -> None:
    data = write_npz(tmp_path / "<b>&.npz", episodes)
    output = tmp_path / "page.html"
    names = f"{HOSTILE},</title>,z"
    assert command.main([str(chunk_bundle), "--data", str(data), "--names", names, "--output", str(output)]) == 0
    text = output.read_text()
    reader = _Reader(text)
    assert HOSTILE not in text
    assert "<b>" not in text
    assert "<b>&.npz" in reader.text
    assert reader.data()["names"] == [HOSTILE, "</title>", "z"]
    assert reader.open == []


def test_a_name_that_is_no_unicode_is_shown_all_the_same(chunk_bundle: Path, data: Path, tmp_path: Path) -> None:
    odd = data.rename(tmp_path / "d\udcff.npz")
    assert command.main([str(chunk_bundle), "--data", str(odd), "--output", str(tmp_path / "page.html")]) == 0
    assert "d\\udcff.npz" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_numbers_of_the_page_are_those_of_the_data(written: str, episodes: list[np.ndarray]) -> None:
    found = _Reader(written).data()
    assert found["prefixes"] == [*range(1, 10)]
    for chunk in found["chunks"]:
        recorded = episodes[chunk["episode"]][chunk["step"] : chunk["step"] + 4]
        np.testing.assert_allclose(chunk["actions"], recorded, rtol=1e-4)
        assert np.shape(chunk["decoded"]) == (9, 4, 3)
    errors = np.array(found["chunks"][0]["decoded"]) - found["chunks"][0]["actions"]
    rms = np.sqrt(np.square(errors / np.array(found["units"])).mean(axis=(1, 2)))
    np.testing.assert_allclose(found["chunks"][0]["rms"], rms, rtol=1e-2, atol=1e-4)


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_the_script_is_javascript() -> None:
    script = Path(page_module.__file__).with_name("page.js")
    done = subprocess.run([str(NODE), "--check", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# In a browser --------------------------------------------------------------------------------------------------------

_MOVE = """
const move = (id, value) => {
  document.getElementById(id).value = value;
  document.getElementById(id).dispatchEvent(new Event("input"));
};
move("amount", 6);
move("chunk", 2);
"""


def shown(text: str, folder: Path, script: str = "") -> str:
    """What a browser has made of the page, after another script, which the policy is told of."""
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        text = text.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
        text = text.replace("</body>", f"<script>{script}</script></body>")
    (folder / "shown.html").write_text(text)
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'browser'}", "--dump-dom"]
    done = subprocess.run(
        [str(BROWSER), *options, f"file://{folder / 'shown.html'}"],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_draws_the_chunk_and_follows_the_slider(written: str, tmp_path: Path) -> None:
    found = _Reader(written).data()
    for script, prefix, chunk in (("", found["prefixes"].index(min(map(int, found["bounds"]))), 0), (_MOVE, 6, 2)):
        seen = html.unescape(shown(written, tmp_path, script))
        used, place = found["prefixes"][prefix], found["chunks"][chunk]
        assert f"{used} of 9 tokens, {found['bits'][prefix]:g} bits a step. RMS error of this chunk" in seen
        assert len(re.findall(r'<span class="used">', seen)) == used
        assert f"Class {place['class_number']}, named by token 0" in seen
        curves = seen[seen.index('id="curves"') : seen.index("</section>", seen.index('id="curves"'))]
        # Recorded and decoded, in each of three dimensions.
        assert [curves.count(f'<polyline class="{kind}"') for kind in ("true", "decoded")] == [3, 3]
        assert curves.count('class="band"') == (3 if str(used) in found["bounds"] else 0)
        assert "NaN" not in seen[: seen.index('id="data"')]
