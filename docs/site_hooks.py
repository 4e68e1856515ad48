"""What `make docs` adds to mkdocs: files outside docs/ that a page links to join the site, cells know their column."""

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from mkdocs.structure.files import File, Files

LINK = re.compile(r"(?<!!)\]\(([^)\s]+)\)")


def on_files(files: Files, config):
    """Add every file of the repository that a page's link names and that lies outside the docs folder.

    Markdown becomes a page, whose own links count too; anything else is copied. Either lies below ``source/`` by its
    path in the repository.
    """
    root, docs = Path(config.config_file_path).parent, Path(config.docs_dir)
    waiting = [docs / file.src_uri for file in files.documentation_pages()]
    while waiting:
        page = waiting.pop()
        for target in LINK.findall(page.read_text(encoding="utf-8")):
            path = urlsplit(target).path
            found = page.parent.joinpath(path).resolve() if path else page
            if not found.is_file() or not found.is_relative_to(root) or found.is_relative_to(docs):
                continue
            uri = f"source/{found.relative_to(root).as_posix()}"
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(found)))
                waiting += [found] if found.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Let links lead to where `on_files` put what lies outside the docs folder."""
    root, docs = Path(config.config_file_path).parent, Path(config.docs_dir)
    uri = page.file.src_uri
    source = root / uri.removeprefix("source/") if uri.startswith("source/") else docs / uri

    def moved(match: re.Match) -> str:
        parts = urlsplit(match[1])
        found = source.parent.joinpath(parts.path).resolve() if parts.path and not parts.scheme else None
        if found is None or not found.is_relative_to(root) or not found.exists():
            return match[0]
        there = found.relative_to(docs) if found.is_relative_to(docs) else Path("source") / found.relative_to(root)
        if files.get_file_from_path(there.as_posix()) is None:
            return f"](#{parts.fragment})" if found == source else match[0]
        depth = "../" * uri.count("/")
        return f"]({depth}{there.as_posix()}{'#' + parts.fragment if parts.fragment else ''})"

    return LINK.sub(moved, markdown)


def on_page_content(html: str, page, config, files: Files) -> str:
    """Note with every cell of a table its column's head, under which a narrow screen shows it (site.css)."""

    def labelled(table: re.Match) -> str:
        heads = [re.sub(r"<.*?>", "", head) for head in re.findall(r"<th(?:\s[^>]*)?>(.*?)</th>", table[0], re.S)]
        rows = re.split(r"(?=<tr[\s>])", table[0])
        return "".join(named(row, iter(heads)) for row in rows)

    def named(row: str, heads: Iterator[str]) -> str:
        return re.sub(r"<td\b", lambda _: f'<td data-label="{next(heads, "")}"', row)

    return re.sub(r"<table>.*?</table>", labelled, html, flags=re.S)
