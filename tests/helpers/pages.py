"""The pages that people read, in parts that a test can look at and run.

A comment in Markdown, which a reader does not see, says what a block is for: `<!-- file: mine.py -->` before a block that is
a file of the page, `<!-- run -->` before commands that are run with what they print, `<!-- run on a terminal -->`,
`<!-- run, in any order -->` where ranks print, `..., in the full sweep` where that takes long.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
READMES = (ROOT / "README.md", ROOT / "README.zh-CN.md")
CHINESE = sorted((ROOT / "docs" / "zh").glob("*.md"))  # of the English page of the same name
PAGES = [*READMES, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs/gallery").glob("*.md")), *CHINESE]

_FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^(?P<indent> *)```(?P<kind>\w*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_HEADING = re.compile(r"^(#+) +(.+?)\s*$", re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")


@dataclass(frozen=True)
class Block:
    """What is between two fences.

    Attributes:
        page: its file.
        line: of the first fence.
        kind: what is written after it: console, python, ...
        text: what is between.
        mark: what the comment before it says, or nothing.
    """

    page: Path
    line: int
    kind: str
    text: str
    mark: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def commands(self) -> list[tuple[str, list[str]]]:
        """The commands of a console block, each with the lines that it prints; words after a # are not of it."""
        found: list[tuple[str, list[str]]] = []
        for line in self.text.splitlines():
            if prompt := re.match(r"^\s*(?:login|node\d)?\$ (.*)$", line):
                found.append((re.sub(r"\s+# .*$", "", prompt[1]), []))
            elif found:
                found[-1][1].append(line)
        return found


def blocks(page: Path, kind: str | None = None) -> list[Block]:
    """Returns a page's fenced blocks, all or those of a kind."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        inner = re.sub(f"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
        line = text.count("\n", 0, match.start("indent")) + 1
        found.append(Block(page, line, match["kind"], inner, match["mark"] or ""))
    return [block for block in found if kind in (None, block.kind)]


def prose(page: Path) -> str:
    """Returns a page's text without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def links(page: Path) -> list[str]:
    """Returns where a page's links lead."""
    return _LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page)))


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as the usual hosts make them."""
    found: dict[str, int] = {}
    for _, words in _HEADING.findall(prose(page)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", words).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {f"{slug}-{n}" if n else slug for slug, count in found.items() for n in range(count + 1)}


def files_of(page: Path) -> dict[str, str]:
    """Returns the files that a page has in its blocks, by name."""
    marked = [(block.mark.removeprefix("file: "), block.text) for block in blocks(page)]
    return {
        name: text for (name, text), block in zip(marked, blocks(page), strict=True) if block.mark.startswith("file: ")
    }


_NUMBER = r"\d+(?:\.\d+)?(?:e-\d+)?"
_VARIES = [
    (re.compile(r"\b\d{8}\\-\d{6}\b"), lambda _: r"\d{8}-\d{6}"),  # a run's time
    # Three decimals and more are what was computed, fewer what was measured.
    (re.compile(r"\b\d+\\\.(\d+)(?:e\\-\d+)?"), lambda m: f"({_NUMBER})" if len(m[1]) > 2 else _NUMBER),
]


@dataclass(frozen=True)
class Said:
    """What a page says that a command prints: see `said`.

    Attributes:
        pattern: what the output must be like, with a group for each number that was computed.
        numbers: these numbers, as the page has them.
    """

    pattern: re.Pattern[str]
    numbers: list[float]

    def differs(self, output: str) -> str:
        """Returns in what an output is not as the page says; nothing where it is."""
        found = self.pattern.fullmatch(plain(output))
        if found is None:
            return "the lines are others"
        pairs = zip(self.numbers, map(float, found.groups()), strict=True)
        return ", ".join(f"{one} is {other}" for one, other in pairs if abs(one - other) > 0.02 + 0.05 * abs(one))


def said(lines: list[str]) -> Said:
    """Reads the lines that a page shows. What varies: a run's date, measured numbers, and computed ones a little.

    Whole numbers are as they are written. `...` is anything; alone in a line it is any number of lines, or none.
    """
    parts, numbers = [], []
    for line in lines:
        if line.strip() == "...":
            parts.append(r"(?:[^\n]*\n)*?")
            continue
        pieces = []
        for piece in plain(line).rstrip("\n").split("..."):
            escaped = re.escape(piece).replace(r"\ ", " ")
            numbers += [float(m[0].replace("\\", "")) for m in _VARIES[1][0].finditer(escaped) if len(m[1]) > 2]
            for number, varies in _VARIES:
                escaped = number.sub(varies, escaped)
            pieces.append(escaped)
        parts.append("[^\n]*".join(pieces) + "\n")
    return Said(re.compile("".join(parts)), numbers)


def plain(output: str) -> str:
    """Returns an output as `said` compares it: one blank for several, none at a line's end."""
    return "".join(re.sub(r" {2,}", " ", line.rstrip()) + "\n" for line in output.splitlines())
