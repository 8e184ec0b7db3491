"""Links out of docs/: the file they lead to joins the site, so that one link serves GitHub and the site."""

from __future__ import annotations

import os.path
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?!https?:)([^)#\s]+)")
FOLDER = "repository"  # of the site, where files from outside docs/ lie


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pending = [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path]
    seen: set[Path] = set()
    while pending:
        source = pending.pop()
        for link in LINK.findall(source.read_text(encoding="utf-8")):
            target = (source.parent / link).resolve()
            if target in seen or _site_path(target) == _in_docs(target) or not target.is_file():
                continue
            seen.add(target)
            # Such a page is reached by its links alone, never from the navigation.
            files.append(
                File.generated(
                    config, _site_path(target), abs_src_path=str(target), inclusion=InclusionLevel.NOT_IN_NAV
                )
            )
            if target.suffix == ".md":
                pending.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    source = Path(page.file.abs_src_path or "").resolve()

    def rewritten(match: re.Match[str]) -> str:
        target = (source.parent / match[1]).resolve()
        if not target.is_file():
            return match[1]  # mkdocs itself complains
        return os.path.relpath(_site_path(target), os.path.dirname(page.file.src_uri) or ".")

    return LINK.sub(rewritten, markdown)


def _in_docs(target: Path) -> str | None:
    docs = ROOT / "docs"
    return target.relative_to(docs).as_posix() if target.is_relative_to(docs) else None


def _site_path(target: Path) -> str:
    if inside := _in_docs(target):
        return inside
    return f"{FOLDER}/{os.path.relpath(target, ROOT)}".replace("README.md", "readme.md")
