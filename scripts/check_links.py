"""Checks links: `check_links.py FILE.md...` those of Markdown files, `check_links.py --book FOLDER`
those of a book's pages. A link has to lead to a file that is there, and a fragment to a heading of
it; links to other sites are not followed.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LINK = re.compile(r"\]\(([^()\s]+)\)")
HEADING = re.compile(r"^#+ +(.*?) *$", re.MULTILINE)
FENCE = re.compile(r"^(```|~~~).*?^\1 *$", re.MULTILINE | re.DOTALL)


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def anchor(heading: str) -> str:
    """What a heading is called in a link, by GitHub's rules."""
    words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    found: set[str] = set()
    for heading in HEADING.findall(FENCE.sub("", path.read_text())):
        name, number = anchor(heading), 0
        while (unique := name if not number else f"{name}-{number}") in found:
            number += 1
        found.add(unique)
    return found


def markdown(path: Path) -> list[str]:
    wrong = []
    for link in LINK.findall(without_code(path.read_text())):
        to = urlsplit(link)
        if to.scheme:
            continue
        target = path if not to.path else path.parent / unquote(to.path)
        if not target.exists():
            wrong.append(f"{path}: {link} leads nowhere")
        elif to.fragment and target.suffix == ".md" and to.fragment not in anchors(target):
            wrong.append(f"{path}: {link}: there is no such heading")
    return wrong


class Page(HTMLParser):
    """The links and the ids of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            elif value and ((tag == "a" and name == "href") or name == "src"):
                self.links.append(value)


def book(folder: Path) -> list[str]:
    pages = {path: Page(path) for path in folder.rglob("*.html")}
    wrong = []
    for path, page in pages.items():
        # All of it on one page; and what a server shows for a page that is not there.
        if path.name in ("print.html", "404.html", "toc.html"):
            continue
        for link in page.links:
            to = urlsplit(link)
            if to.scheme or to.netloc:
                continue
            target = path if not to.path else (path.parent / unquote(to.path)).resolve()
            target = target / "index.html" if target.is_dir() else target
            known = pages.get(target) or pages.get(folder.resolve() / target)
            if not target.exists():
                wrong.append(f"{path}: {link} leads nowhere")
            elif to.fragment and known and to.fragment not in known.ids:
                wrong.append(f"{path}: {link}: there is no such heading")
    return wrong


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["--book"]:
        wrong = book(Path(arguments[1]).resolve())
    else:
        wrong = [line for file in arguments for line in markdown(Path(file))]
    if wrong:
        sys.exit("\n".join(wrong))


main()
