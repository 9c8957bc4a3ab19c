"""What the pages say is there: commands, options, keys, files, links, error texts; and both READMEs say the same."""

from __future__ import annotations

import ast
import difflib
import re
import shlex
from pathlib import Path

import pytest
from helpers.pages import CHINESE, PAGES, READMES, ROOT, Block, anchors, blocks, files_of, links, prose
from helpers.parsing import commands_of, parse

from dtrain.checkpoint.compat import FREE
from dtrain.config.schema import BUILDER_SECTIONS, RunConfig, leaves, section_of

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
_WORDS_OF_A_KEY = re.compile(
    r"`((?:train|parameters|checkpoint|early_stopping|run|track)\.(?!(?:yaml|py)\b)[a-z_.]+)\b(?![(/])"
)


@pytest.mark.parametrize("page", READMES, ids=lambda page: page.name)
def test_a_readme_begins_with_the_two_commands(page: Path) -> None:
    first = blocks(page)[0]
    assert first.text == "$ pip install . && dtrain train\n$ pip install '.[test]' && pytest\n"
    assert first.line <= 6
    other = next(one.name for one in READMES if one != page)
    assert other in "".join(page.read_text().splitlines()[first.line + 3 : first.line + 6]), "a link to the other one"


def test_both_readmes_have_the_same_blocks_and_links() -> None:
    ours, theirs = READMES
    assert [_said(block) for block in blocks(ours)] == [_said(block) for block in blocks(theirs)]
    files = [{_file_of(link) for link in links(page)} - {ours.name, theirs.name} for page in READMES]
    own = {str(page.relative_to(ROOT)) for page in CHINESE}
    assert files[1] >= own, "the Chinese README leads to the Chinese pages"
    assert files[0] == {name.replace("docs/zh/", "docs/") for name in files[1]}
    inline = [sorted(re.findall(r"`((?:dtrain|pytest|python|pip|DTRAIN_)[^`]*)`", prose(page))) for page in READMES]
    assert inline[0] == inline[1]


@pytest.mark.parametrize("page", CHINESE, ids=lambda page: page.name)
def test_a_chinese_page_says_what_the_english_one_does(page: Path) -> None:
    english = page.parents[1] / page.name
    assert [_said(block) for block in blocks(page)] == [_said(block) for block in blocks(english)]
    told = [re.findall(r"^#+ |^\|(?=[^\n])|^\d\. |^- ", prose(one), re.MULTILINE) for one in (page, english)]
    assert told[0] == told[1], "the same headings, rows and items"
    code = [set(re.findall(r"`([^`\n]+)`", re.sub(r"\n *", " ", prose(one)))) for one in (page, english)]
    assert {word for word in code[1] - code[0] if re.match(r"dtrain |--|[A-Z_]{4,}$|\w+\.\w+", word)} == set()
    assert english.resolve() in {(page.parent / _file_of(link)).resolve() for link in links(page)}
    assert page in {(english.parent / _file_of(link)).resolve() for link in links(english)}


def _said(block: Block) -> object:
    """A block without the words after a #, which are in the page's language."""
    return block.kind, block.mark, block.commands if block.kind == "console" else block.text


def _file_of(link: str) -> str:
    return link.partition("#")[0]


@each_page
def test_every_command_of_a_page_parses(page: Path) -> None:
    for block in blocks(page, "console"):
        for line, _ in block.commands:
            for command in commands_of(line):
                try:
                    parse(command)
                except Exception as error:  # noqa: BLE001 - whatever is wrong with it
                    pytest.fail(f"{block}: {command}\n{error}")


@each_page
def test_every_command_within_a_page_s_text_parses(page: Path) -> None:
    """As far as it is whole: `...` and brackets stand for more; a verb alone may lack its arguments, or its second word."""
    for code in re.findall(r"`(dtrain [a-z][^`\n]*)`", prose(page)):
        if "..." not in code and "[" not in code and "slurm-job" not in code:
            try:
                parse(re.sub(r"\b[KMN]\b", "2", code))
            except Exception as error:  # noqa: BLE001
                told = f"{type(error).__name__} {error}"
                assert "Missing" in told or "NoArgsIsHelp" in told, f"{page.name}: {code}\n{error}"


def test_what_does_not_parse_is_found() -> None:
    for wrong in ("dtrain trian", "dtrain train --noes", "dtrain launch -n 2 -- train --noes", "dtrain check partiy"):
        with pytest.raises(Exception, match=r"(?i)no such"):
            parse(wrong)
    assert commands_of("$ A=1 dtrain train x=1 | head && dtrain jobs > out") == ["dtrain train x=1", "dtrain jobs"]


@each_page
def test_every_python_block_compiles(page: Path) -> None:
    for block in blocks(page, "python"):
        try:
            ast.parse(block.text)
        except SyntaxError as error:
            pytest.fail(f"{block}: {error}")


@each_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}: there are {sorted(anchors(target))}"


def test_every_page_is_reached_from_the_readme() -> None:
    for readme in READMES:
        there = {(readme.parent / _file_of(link)).resolve() for link in links(readme) if not link.startswith("http")}
        there |= {page.parents[1] / page.name for page in CHINESE if page in there}
        assert {page for page in PAGES if page.parent.name == "docs"} <= there


@each_page
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"(?<![\w/.])(?:tests|configs|launch|slurm|docs|dtrain)/[\w./-]*\w", text):
        assert (ROOT / name).exists(), f"{page.name}: {name}"


@each_page
def test_every_key_that_a_page_names_is_in_the_schema(page: Path) -> None:
    sections = {key.rpartition(".")[0] for key in leaves()} | {
        name for name, field in RunConfig.model_fields.items() if section_of(field.annotation)
    }
    for key in _WORDS_OF_A_KEY.findall(page.read_text(encoding="utf-8")):
        assert key.rstrip(".") in {*leaves(), *sections}, f"{page.name}: {key}"
    for block in blocks(page, "console"):
        for line, _ in block.commands:
            for word in shlex.split(line, comments=True):
                key, equals, _ = word.partition("=")
                section, dot, _ = key.partition(".")
                if equals and dot and section in RunConfig.model_fields and section not in BUILDER_SECTIONS:
                    wrong = "train.epoch" in line  # which shows the error
                    assert key in leaves() or wrong, f"{block}: {key}"


def test_what_may_differ_from_a_run_is_all_on_its_page() -> None:
    """A refusal leaves the list to the page."""
    text = re.sub(r"(?<!\n)\n(?!\n)", " ", (ROOT / "docs" / "checkpoints.md").read_text())
    told = text[text.index("Keys that don't affect results may change: ") :].partition("\n\n")[0]
    keys = [key + "*" * key.endswith(".") for key in FREE if key not in ("recipe", "defaults")]
    assert re.findall(r"`([^`]+)`", told) == keys


def test_the_difference_of_the_scripts_is_the_page_s() -> None:
    before, after = ((ROOT / "tests/recipes" / f"script_{name}.py").read_text() for name in ("before", "after"))
    (block,) = blocks(ROOT / "docs/script-style.md", "diff")
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=1, lineterm="")
    assert [line.rstrip() for line in block.text.splitlines() if not line.startswith("@@")] == [
        line.rstrip() for line in lines if not line.startswith(("@@", "---", "+++"))
    ]


def test_every_error_text_of_troubleshooting_is_in_the_code() -> None:
    said = _texts()
    page = ROOT / "docs/troubleshooting.md"
    known = [row.split("|")[1] for row in page.read_text().splitlines() if row.startswith("| `")]
    assert len(known) > 60
    for cell in known:
        for text in re.findall(r"`([^`]+)`", cell):
            pieces = [piece for piece in re.split(r"\.\.\.|`", text) if len(piece.strip()) > 2]
            if not _TYPERS.match(text):
                assert any(_in_order(pieces, one) for one in said), f"no error of dtrain's says: {text}"


_TYPERS = re.compile(r"No such (command|option)")


def _texts() -> list[str]:
    """All texts of the code, as they are written; what is put into them is left out."""
    found = []
    for path in (ROOT / "dtrain").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def _in_order(pieces: list[str], text: str) -> bool:
    at = 0
    for piece in pieces:
        at = text.find(piece.strip(), at)
        if at < 0:
            return False
        at += len(piece.strip())
    return True


def test_files_of_a_page_are_whole() -> None:
    """A page's own files are recipes or scripts that run: tests/launch/test_docs_commands.py runs them."""
    found = {page.name: set(files_of(page)) for page in PAGES}
    assert found["README.md"] == {"mine.py"}
