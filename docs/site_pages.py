"""Has the site begin with the README; its links to docs/ are made the site's own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "README.zh-CN.md": "README.zh-CN.md"}
REPOSITORY = ("LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "tests/", "configs/", "launch/", "slurm/")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that lie outside of docs/."""
    for source, target in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, target, content=_of_site(text)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Pages link to each other as on the disk; what is in the repository alone is named without a link."""
    up = "../" * (page.file.src_uri.count("/") + 1)  # to the repository
    inside = up.removeprefix("../")  # to docs/

    def linked(match: re.Match[str]) -> str:
        return _linked(match[1], match[2], inside)

    return re.sub(rf"\[([^\]]*)\]\({re.escape(up)}((?!docs/|\.\./)[^)]*)\)", linked, markdown)


def _of_site(text: str) -> str:
    return re.sub(r"\[([^\]]*)\]\((?!https?:|#)([^)]*)\)", lambda match: _linked(match[1], match[2]), text)


def _linked(words: str, target: str, to_docs: str = "") -> str:
    file, mark, anchor = target.removeprefix("docs/").partition("#")
    if file.startswith(REPOSITORY):
        return words
    return f"[{words}]({to_docs}{PAGES.get(file, file)}{mark}{anchor})"
