"""What a person sees: tables for terminal, Markdown and page, and one page that needs nothing else."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from rfsq.calibration.tables import Table
from rfsq.evidence.chunk_results import ChunkComparison
from rfsq.evidence.findings import AS_TRAINED, REFITTED
from rfsq.evidence.plots import choice, error_by_layer, figures, svg
from rfsq.evidence.report import page
from rfsq.evidence.results import Comparison, Spread
from rfsq.evidence.tables import findings_table, layer_table, number, peer_table, summary_table
from tests.evidence.test_findings import peer

TABLE = Table("Title", ("name", "value"), (("`code` a", "1.5"), ("**bold** <b>", "22")))


@pytest.fixture(scope="module")
def with_peers(comparison: Comparison) -> Comparison:
    return replace(comparison, peers=(peer("bins", 42.0, 1e-4), peer("bins", 84.0, 1e-6)), peer_verdict=("bins & us",))


def test_text_lines_up() -> None:
    assert TABLE.text().splitlines() == [
        "Title",
        "name      value",
        "---------------",
        "code a      1.5",
        "bold <b>     22",
    ]


def test_markdown_is_a_pipe_table() -> None:
    assert TABLE.markdown().splitlines()[:3] == ["| name | value |", "|---|--:|", "| `code` a | 1.5 |"]


def test_html_is_escaped() -> None:
    assert "<code>code</code> a" in TABLE.html()
    assert "<b>bold</b> &lt;b&gt;" in TABLE.html()


@pytest.mark.parametrize(
    ("spread", "text"),
    [
        (Spread.of([1.5e-5]), "1.50e-05"),
        (Spread.of([0.25]), "0.25"),
        (Spread.of([0.0]), "0"),
        (Spread.of([1.5e-5, 1.7e-5]), "(1.60 ± 0.14)e-5"),
        (Spread.of([0.25, 0.27]), "0.26 ± 0.01"),
    ],
)
def test_numbers_show_their_spread(spread: Spread, text: str) -> None:
    assert number(spread) == text


def test_summary_has_three_rows_for_every_scheme_and_the_autoencoders(comparison: Comparison) -> None:
    rows = summary_table(comparison).rows

    # The refitted readout has a row where a checkpoint kept one.
    assert len(rows) == 5 * 3 + len(comparison.unquantised)
    assert {"naive autoencoder", "robust autoencoder"} <= comparison.unquantised.keys()
    assert [row[1] for row in rows[:3]] == ["L0–L7", "L0–L2", "L3–L7"]
    assert [row[2] for row in rows[:3]] == ["359", "135", "225"]


def test_the_autoencoder_is_named_as_trained_and_refitted(comparison: Comparison) -> None:
    naive, trained = (comparison.unquantised[f"{kind} autoencoder"] for kind in ("naive", "robust"))
    kept = replace(comparison, unquantised={"naive autoencoder": naive, AS_TRAINED: trained, REFITTED: naive})
    rows = {row[0]: row[3] for row in summary_table(kept).rows[-3:]}
    assert rows == {
        "naive autoencoder, no quantiser": number(naive["action_mse"]),
        "robust autoencoder as trained, no quantiser": number(trained["action_mse"]),
        "robust autoencoder, readout refitted, no quantiser": number(naive["action_mse"]),
    }


def test_a_scheme_has_a_row_for_every_layer_and_group(comparison: Comparison) -> None:
    table = layer_table(comparison.scheme("calibrated"))

    assert [row[0] for row in table.rows] == [f"L{layer}" for layer in range(8)] + ["L0–L2", "L3–L7", "L0–L7"]


def test_peers_and_ours_are_sorted_by_bits(with_peers: Comparison) -> None:
    bits = [float(row[1]) for row in peer_table(with_peers).rows]

    assert bits == sorted(bits)
    assert {42.0, 84.0} < set(bits)


@pytest.fixture(scope="module")
def drawn(with_peers: Comparison) -> dict[str, str]:
    return {name: svg(figure) for name, figure in figures(with_peers).items()}


def chosen(comparison: Comparison, judged: str) -> dict[str, list[float]]:
    """The bits of each line of the choice, beside codecs of chunks that were judged on these episodes."""
    reports = (peer("bins", 20.0, 1e-3), peer("chunk tokens", 20.0, 1e-4), peer("chunk tokens", 10.0, 1e-3))
    found = ChunkComparison("", "", judged, (0,), (20.0,), {}, (1e-4,), reports, {}, {}, ())
    lines = choice(comparison, found).axes[0].lines
    return {str(line.get_label()): [*map(float, line.get_xdata())] for line in lines}


def test_a_codec_of_chunks_takes_the_place_of_a_peer_of_its_family(with_peers: Comparison) -> None:
    lines = chosen(with_peers, "test")
    assert (lines["bins"], lines["chunk tokens"]) == ([20.0], [10.0, 20.0])
    assert {*lines} == {"bins", "chunk tokens", "per-step tokens, recovered", "per-step tokens, calibrated"}


def test_what_was_judged_on_other_episodes_says_so(with_peers: Comparison) -> None:
    assert {*chosen(with_peers, "validation")} == {
        "bins", "chunk tokens", "per-step tokens, recovered (test)", "per-step tokens, calibrated (test)",
    }  # fmt: skip


class _Reader(HTMLParser):
    """Tags that were opened and never closed, and everything that would be loaded from elsewhere."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "path", "use", "stop", "rect"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.loaded += [
            value or ""
            for name, value in attributes
            if name in ("src", "href", "xlink:href") and value and value[0] != "#"
        ]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_loads_nothing(with_peers: Comparison, drawn: dict[str, str]) -> None:
    content = page(with_peers, drawn, [("Further", "<p>section</p>")])
    reader = _Reader()
    reader.feed(content)

    assert reader.open == []
    assert reader.loaded == []
    assert "url(http" not in content
    assert "<script" not in content
    assert content.count("<svg") == 8


def test_the_page_shows_every_table_and_where_it_comes_from(with_peers: Comparison, drawn: dict[str, str]) -> None:
    reader = _Reader()
    reader.feed(page(with_peers, drawn))

    for row in (*summary_table(with_peers).rows, *findings_table(with_peers).rows):
        assert re.sub("[`*]", "", row[0]) in reader.text
    assert "bins & us" in reader.text
    assert with_peers.data.sha256 in reader.text
    assert all(sha256 in reader.text for sha256 in with_peers.checkpoints.values())


def test_equal_figures_are_equal_text(comparison: Comparison) -> None:
    first, second = (svg(error_by_layer(comparison)) for _ in range(2))

    assert first == second


def test_the_page_says_so_where_robust_tokens_lose(comparison: Comparison, drawn: dict[str, str]) -> None:
    """Headline, lead and claims follow from the figures."""
    lost = replace(
        comparison,
        improvement=-0.481,
        findings=tuple(replace(finding, holds=False) for finding in comparison.findings),
    )
    text = page(lost, drawn)
    assert "<h1>Robust tokens lose to naive ones here</h1>" in text
    assert "48.1% more action error than naive ones" in text
    assert "-48.1" not in text
    assert "−48.1" not in text
    claims = re.findall(r"<tr><td>(.*?)</td>", text[text.index("class=findings") : text.index("</table>")])
    assert claims
    assert all(claim.startswith("NOT so: ") for claim in claims)
