"""Writes what of the pages is made from the code: the table of keys in configs.md, api.md, and the gallery.

`python docs/make.py` writes them; tests/unit/test_docs_made.py tells when that is due.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import textwrap
from importlib import import_module
from pathlib import Path
from typing import Any

import dtrain
from dtrain.config.keys import kind_of, yaml_word
from dtrain.config.schema import BUILDER_SECTIONS, RunConfig, section_of

DOCS = Path(__file__).parent
_BEGIN, _END = "<!-- keys: made by `python docs/make.py` -->", "<!-- end of the keys -->"

# The public names, by what they are for. Those with a module before them are not in `dtrain.__all__`.
GROUPS = {
    "Training": ["train_model", "KerasModel", "Mean"],
    "A loop of your own": ["prepare", "Meter", "History", "run", "save_weights"],
    "Ranks": ["rank", "world_size", "is_main", "print_main", "gather"],
    "After the training": [
        *("load", "load_weights", "export"),
        "read_history",
        "dtrain.engine.predict.evaluate_task",
        "dtrain.engine.predict.predict",
    ],
    "Options": ["dtrain.engine.options.RunOptions"],
    "Callbacks": ["Callback", "Run", "dtrain.engine.callback.EngineCallback"],
    "Errors": [
        *("DtrainError", "UsageError", "ConfigError", "RecipeError", "WorldError"),
        *("DataError", "StepError", "RankError", "StopRequested"),
    ],
}
_API_HEAD = """# The Python API

Made from the docstrings by `python docs/make.py`. The public names load on first use, so that `import dtrain` loads
neither torch nor pandas. Everything else in the package may change without notice.
"""
_WIDTH = 100
_PART = re.compile(r"^(Args|Attributes|Returns|Raises|Yields):\s*$")
_ITEM = re.compile(r"^ {4}([\w*][\w*, .]*):(?:\s+(.*))?$")


def pages() -> dict[Path, str]:
    """Returns each page that is made, or has a part that is, as it should be."""
    configs = DOCS / "configs.md"
    head, _, rest = configs.read_text(encoding="utf-8").partition(_BEGIN)
    tail = rest.partition(_END)[2]
    made = {configs: f"{head}{_BEGIN}\n\n{keys()}\n{_END}{tail}", DOCS / "api.md": api()}
    return made | _beside("gallery_pages").pages()


def _beside(name: str) -> Any:
    """Returns a module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- the keys of a config


def keys() -> str:
    """Returns a table for each section of the schema: key, default, what it may be, in words."""
    top = [_row("", name, field) for name, field in RunConfig.model_fields.items() if _is_leaf(name, field)]
    top += [f"| `{section}.*` | | | parameters of the recipe's `{of}` |" for section, of in BUILDER_SECTIONS.items()]
    parts = [_table("The recipe", "The user's file, and what its functions take.", top)]
    for name, field in RunConfig.model_fields.items():
        section = section_of(field.annotation)
        if section is not None:
            parts.append(_table(f"`{name}.*`", section.__doc__ or "", _rows(section, f"{name}.")))
    return "\n".join(parts)


def _is_leaf(name: str, field: Any) -> bool:
    return name not in BUILDER_SECTIONS and section_of(field.annotation) is None


def _rows(section: Any, prefix: str) -> list[str]:
    rows = []
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        rows += [_row(prefix, name, field)] if inner is None else _rows(inner, f"{prefix}{name}.")
    return rows


def _row(prefix: str, name: str, field: Any) -> str:
    if field.is_required():
        default = ""
    else:
        value = field.get_default(call_default_factory=True)
        default = "" if value is None else f"`{yaml_word(value)}`"
    words = (field.description or "").replace("|", "\\|")
    return f"| `{prefix}{name}` | {default} | {kind_of(field, '`')} | {words} |"


def _table(title: str, words: str, rows: list[str]) -> str:
    return "\n".join([f"### {title}", "", words, "", "| key | default | may be | |", "|---|---|---|---|", *rows, ""])


# --- the API


def api() -> str:
    """Returns the page of the public names, with their signatures and docstrings."""
    parts = [_API_HEAD]
    for title, names in GROUPS.items():
        parts.append(f"## {title}\n")
        parts += [_entry(name) for name in names]
    return "\n".join(parts)


def _entry(name: str) -> str:
    module, _, last = name.rpartition(".")
    thing = getattr(import_module(module) if module else dtrain, last)
    full = f"{module or 'dtrain'}.{last}"
    if not inspect.isclass(thing):
        return "\n".join([f"### {full}", "", _signature(full, thing), "", markdown(inspect.getdoc(thing) or "")])
    if issubclass(thing, Exception):
        words = markdown(inspect.getdoc(thing) or "")
        return "\n".join([f"### {full}", "", f"A kind of `{thing.__bases__[0].__name__}`. {words}"])
    lines = [f"### {full}", ""]
    if "__init__" in vars(thing):
        lines += [_signature(full, thing.__init__), ""]
    lines.append(markdown(inspect.getdoc(thing) or ""))
    for method, value in vars(thing).items():
        if not method.startswith("_") and (callable(value) or isinstance(value, (property, classmethod))):
            lines.append(_method(f"{last}.{method}", value))
    return "\n".join(lines)


def _method(name: str, value: Any) -> str:
    if isinstance(value, property):
        return "\n".join([f"#### {name}", "", markdown(inspect.getdoc(value) or "")])
    function = getattr(value, "__func__", value)
    return "\n".join([f"#### {name}()", "", _signature(name, function), "", markdown(inspect.getdoc(function) or "")])


def _signature(name: str, function: Any) -> str:
    """Returns a call in a fenced block, a parameter a line where they are many; annotations as they are written."""
    parts, starred = [], False
    signature = inspect.signature(function)
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            starred = True
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
            starred = True
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        kind = "" if parameter.annotation is parameter.empty else f": {_written(parameter.annotation)}"
        equal = " = " if kind else "="
        default = "" if parameter.default is parameter.empty else f"{equal}{parameter.default!r}"
        parts.append(f"{stars}{parameter.name}{kind}{default}")
    returned = signature.return_annotation
    back = "" if returned in (signature.empty, "None") else f" -> {_written(returned)}"
    line = f"{name}({', '.join(parts)}){back}"
    if len(line) > _WIDTH:
        line = f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){back}"
    return f"```text\n{line}\n```"


def _written(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def markdown(docstring: str) -> str:
    """Returns a docstring in Google's manner as Markdown: its parts as lists, its `::` blocks fenced."""
    out: list[str] = []
    inside = False
    for line in docstring.splitlines():
        item = _ITEM.match(line) if inside else None
        if part := _PART.match(line):
            out += [f"**{part[1]}**", ""]
            inside = True
        elif item:
            out.append(f"- `{item[1]}`: {item[2] or ''}".rstrip())
        elif inside and line.strip():
            out.append(f"  {line.strip()}" if out[-1].startswith(("- ", "  ")) else line.strip())
        else:
            inside = inside and bool(line.strip())
            out.append(line)
    return _fenced("\n".join(out)).replace("::", ":").rstrip() + "\n"


def _fenced(text: str) -> str:
    """Puts the indented block after a `::` between fences."""
    pattern = re.compile(r"::\n\n((?: {4}.*\n?|\n(?= {4}))+)")
    return pattern.sub(lambda found: f":\n\n```text\n{textwrap.dedent(found[1]).rstrip()}\n```\n", text)


def main() -> None:
    """Writes the pages."""
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
