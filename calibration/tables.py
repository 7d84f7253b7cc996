"""Parts of a report, for the terminal, for Markdown and for a page: tables and sentences."""

import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rfsq.runtime.bundle.console import aligned


@dataclass(frozen=True)
class Table:
    """Cells are text already; the first column is left-aligned, the others right."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, title: str, rows: Iterable[Mapping[str, str]]) -> "Table":
        """From one row or more, each a cell by the name of its column; all rows have the same columns.

        >>> print(Table.of("Layers", [{"layer": "L0", "bits": "45"}, {"layer": "L1", "bits": "90"}]).markdown())
        | layer | bits |
        |---|--:|
        | L0 | 45 |
        | L1 | 90 |
        """
        found = list(rows)
        return cls(title, tuple(found[0]), tuple(tuple(row.values()) for row in found))

    def only(self, title: str, *columns: str) -> "Table":
        """These columns alone, under another title."""
        places = [self.header.index(column) for column in columns]
        return Table(title, columns, tuple(tuple(row[place] for place in places) for row in self.rows))

    def text(self) -> str:
        """For a terminal."""
        lines = [list(map(_plain, line)) for line in (self.header, *self.rows)]
        return "\n".join([_plain(self.title), *aligned(lines, is_ruled=True)])

    def markdown(self) -> str:
        """A pipe table without the title."""
        alignment = "|" + "|".join(["---", *["--:"] * (len(self.header) - 1)]) + "|"
        lines = ["| " + " | ".join(line) + " |" for line in (self.header, *self.rows)]
        return "\n".join([lines[0], alignment, *lines[1:]])

    def html(self) -> str:
        """A <table> with its title as caption; every cell but a row's first names its column, for narrow pages."""
        head = "".join(f"<th>{inline_html(cell)}</th>" for cell in self.header)
        labels = ["", *(f' data-label="{html.escape(cell)}"' for cell in self.header[1:])]
        body = "".join(
            "<tr>"
            + "".join(f"<td{label}>{inline_html(cell)}</td>" for label, cell in zip(labels, row, strict=True))
            + "</tr>\n"
            for row in self.rows
        )
        return (
            f"<div class=rows><table><caption>{inline_html(self.title)}</caption>\n<thead><tr>{head}</tr></thead>\n"
            f"<tbody>\n{body}</tbody></table></div>"
        )


#: Of a report: a table, a sentence, or several that stand one below the other.
Part = Table | str | tuple[str, ...]


def as_text(parts: Iterable[Part]) -> str:
    """For a terminal, with an empty line between two parts."""
    return "\n\n".join(
        part.text() if isinstance(part, Table) else _plain(part if isinstance(part, str) else "\n".join(part))
        for part in parts
    )


def _plain(marked: str) -> str:
    """Without the signs of Markdown."""
    return marked.replace("`", "").replace("**", "")


def as_markdown(part: Part) -> str:
    if isinstance(part, Table):
        return part.markdown()
    return part if isinstance(part, str) else "\n".join(f"- {sentence}" for sentence in part)


def as_html(parts: Iterable[Part]) -> str:
    return "\n".join(
        part.html() if isinstance(part, Table)
        else f"<p>{inline_html(part)}</p>" if isinstance(part, str)
        else f"<ul>{''.join(f'<li>{inline_html(sentence)}</li>' for sentence in part)}</ul>"
        for part in parts
    )  # fmt: skip


def prefix_name(prefix: int, num_layers: int) -> str:
    """The first `prefix` of so many layers, in a table: "L0", "L0-L2", "all".

    >>> prefix_name(3, 8)
    'L0-L2'
    """
    if prefix == num_layers:
        return "all"
    return "L0" if prefix == 1 else f"L0-L{prefix - 1}"


def inline_html(cell: str) -> str:
    """Escaped, with `code` and **bold** as Markdown has them; a mean and its deviation stay in one line."""
    parts = html.escape(cell).replace(" ± ", "&nbsp;±&nbsp;").replace(")e-", ")e&#8209;").split("`")
    coded = "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))
    pieces = coded.split("**")
    return "".join(f"<b>{piece}</b>" if index % 2 else piece for index, piece in enumerate(pieces))
