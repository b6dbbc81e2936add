"""A page of HTML as tests read it."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """Tags with their attributes, ids, and all text of a page; tags must be closed in order."""

    VOID = ("meta", "link", "img", "br")
    SHAPES = ("rect", "circle", "path", "line", "polyline", "polygon")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.cells: list[tuple[str, str]] = []
        """Tag and whole text of each cell of a table."""
        self.headings: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)
        if tag in ("h2", "h3"):
            self.headings.append("")
        if tag in ("td", "th"):
            self.cells.append((tag, ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.SHAPES
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes another"

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data
            if {"h2", "h3"} & {*self._open}:
                self.headings[-1] += data.strip()
            if {"td", "th"} & {*self._open}:
                tag, before = self.cells[-1]
                self.cells[-1] = (tag, before + data.strip())

    @property
    def spaced(self) -> str:
        """The text with single spaces."""
        return " ".join(self.text.split())

    def of_class(self, name: str) -> list[str]:
        """Tags that have a class."""
        return [tag for tag, attrs in self.tags if name in (attrs.get("class") or "").split()]
