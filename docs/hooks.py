"""What the site takes from outside `docs/`: README, CONTRIBUTING, CHANGELOG, examples, records of the benchmarks."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
"""Pages of the repository's root and what they are called in the site."""
FOLDERS = (ROOT / "bench" / "results", ROOT / "examples")
"""Their files are copied, and each folder below them gets a page that lists its files."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    below = [
        path for folder in FOLDERS for path in (folder, *sorted(folder.rglob("*"))) if "__pycache__" not in path.parts
    ]
    for path in [ROOT / "LICENSE", ROOT / "bench" / "METHOD.md", *below]:
        name = path.relative_to(ROOT).as_posix()
        if path.is_dir():
            files.append(File.generated(config, f"{name}/index.md", content=_listing(path)))
        else:
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links that are right in the repository, rewritten for the site, where `docs/` is the root."""
    if page.file.src_uri in PAGES.values():
        markdown = markdown.replace("](docs/", "](").replace("](README.md", "](index.md")
    markdown = markdown.replace("](../bench/", "](bench/")
    return re.sub(r"\]\(((?:bench|examples)[^)#\s]*)\)", _to_index, markdown)


def _to_index(link: re.Match[str]) -> str:
    """A link to a folder, as a link to its list of files."""
    return f"]({link[1]}/index.md)" if (ROOT / link[1]).is_dir() else link[0]


def _listing(folder: Path) -> str:
    rows = [f"- [{path.name}]({path.name}{'/index.md' if path.is_dir() else ''})" for path in sorted(folder.iterdir())]
    return "\n".join([f"# {folder.relative_to(ROOT).as_posix()}", "", *rows, ""])
