"""Checks of HTML files: well formed, nothing fetched."""

import re
from html.parser import HTMLParser

from edgepack.report.html.markup import VOID

HOSTILE = "</script><script>alert(1)</script>&amp;\"'"


class Checker(HTMLParser):
    """Open elements, ids, fetched addresses, charts, and the number of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.scripts = 0
        self.charts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [found["id"] or ""] if "id" in found else []
        self.charts += [found["data-chart"] or ""] if "data-chart" in found else []
        for key in ("src", "href"):
            value = found.get(key) or "#"
            self.fetched += [value] if not value.startswith(("#", "data:,")) else []
        self.scripts += tag == "script"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or self.open.pop() == tag


def checked(page: str) -> Checker:
    """Assert that the page is well formed, ids are unique, links resolve, and nothing is fetched."""
    found = Checker(page)
    assert found.open == []
    assert len(set(found.ids)) == len(found.ids)
    assert found.fetched == []
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(found.ids)
    assert "http" not in re.sub(r"http://www\.w3\.org/2000/svg", "", page)
    return found
