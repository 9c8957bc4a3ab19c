"""The environment variables that sources read by a name that is written in them, as hashes of their values.

What names a place or a job differs from start to start and changes no number; what may be a secret is left out.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from dtrain.masking import is_secret, masked
from dtrain.provenance.trees import parsed

# By the whole name, or by what only the variables of one program begin with.
_OF_THE_PLACE = re.compile(
    r"(SLURM|SBATCH|SRUN|CUDA|NVIDIA|ROCR|HIP|NCCL|RCCL|GLOO|TORCH|TORCHELASTIC|PYTORCH|OMP|MKL|OPENBLAS|OMPI|PMI|PMIX|PALS"
    r"|WANDB|MLFLOW|DTRAIN|ACCELERATE|XDG|PYTHON|PYTEST|CONDA|SSH|LC|KMP)_.*"
    r"|PYTHON[A-Z]*|MASTER_(ADDR|PORT)|((LOCAL|GROUP|ROLE|NODE)_)?(RANK|WORLD_SIZE)|NODE_?ID|NODES|NNODES"
    r"|HF_(HOME|HUB_CACHE|DATASETS_CACHE|ASSETS_CACHE|TOKEN)|TRANSFORMERS_CACHE|LD_(LIBRARY_PATH|PRELOAD)|VIRTUAL_ENV"
    r"|TMP|TEMP|TMPDIR|TEMPDIR|HOME|USER|LOGNAME|HOST|HOSTNAME|PWD|OLDPWD|PATH|SHELL|TERM|DISPLAY|LANG|COLUMNS|LINES|CI"
    r"|EDITOR|PAGER|TZ"
)
_SECRET = ("PASS", "AUTH", "CRED", "CREDS", "PAT", "PIN")
_READERS = ("get", "pop", "setdefault", "__getitem__", "__contains__")
_OF_OS = ("environ", "environb")


def variable_hashes(sources: Iterable[bytes], environ: Mapping[str, str]) -> dict[str, str]:
    """Returns name -> a hash of the value, empty where it is not set, of the variables that sources read."""
    names = {name for content in sources for name in _names_in(content)}
    return {
        name: _hash(environ[name]) if name in environ else ""
        for name in sorted(names)
        if not _OF_THE_PLACE.fullmatch(name) and not _may_be_secret(name, environ.get(name, ""))
    }


def _may_be_secret(name: str, value: str) -> bool:
    """Whether a value may be a secret, a number included: a hash of a short one can be undone by trying."""
    return is_secret(name, "text") or masked(name, value) != value or name.rpartition("_")[2] in _SECRET


def _hash(value: str) -> str:
    return hashlib.sha256(value.encode(errors="surrogateescape")).hexdigest()[:12]


@functools.lru_cache(maxsize=256)  # a run asks again for each checkpoint that has more code, and at its resume
def _names_in(content: bytes) -> frozenset[str]:
    if b"environ" not in content and b"getenv" not in content:
        return frozenset()
    tree = parsed(content)
    return frozenset() if tree is None else frozenset(_names_read([*ast.walk(tree)]))


def _names_read(nodes: Sequence[ast.AST]) -> Iterator[str]:
    source = _Source(nodes)
    for node in nodes:
        key = source.read_by(node)
        if isinstance(key, ast.Name):
            key = source.constants.get(key.id)
        if isinstance(key, ast.Constant):
            if isinstance(key.value, str):
                yield key.value
            elif isinstance(key.value, bytes):
                yield key.value.decode(errors="surrogateescape")


class _Source:
    """What a file calls the environment, and the texts that it has given names.

    Attributes:
        constants: name -> the text, of names that are assigned once.
    """

    def __init__(self, nodes: Sequence[ast.AST]) -> None:
        self._environments, self._functions = set(_OF_OS), {"getenv", "getenvb"}
        assigned = [(node.targets[0], node.value) for node in nodes if _is_assignment(node)]  # type: ignore[attr-defined]
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module == "os":
                for alias in node.names:
                    known = self._environments if alias.name in _OF_OS else self._functions
                    if alias.name in (*_OF_OS, "getenv", "getenvb"):
                        known.add(alias.asname or alias.name)
        for target, value in assigned:
            if _ends_with(value, self._environments):
                self._environments.add(target.id)
            elif _ends_with(value, self._functions):
                self._functions.add(target.id)
        names = [target.id for target, _ in assigned]
        self.constants = {
            target.id: value
            for target, value in assigned
            if isinstance(value, ast.Constant) and names.count(target.id) == 1
        }

    def read_by(self, node: ast.AST) -> ast.expr | None:
        """Returns the name, as it stands there, of the variable that a part of a file reads; None where none is."""
        if isinstance(node, ast.Subscript) and _ends_with(node.value, self._environments):
            return node.slice
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
            return node.left if _ends_with(node.comparators[0], self._environments) else None
        if isinstance(node, ast.Call) and self._reads(node.func):
            named = (keyword.value for keyword in node.keywords if keyword.arg == "key")
            return node.args[0] if node.args else next(named, None)
        return None

    def _reads(self, function: ast.expr) -> bool:
        """Whether it is `os.getenv` or `os.environ.get`, however imported."""
        if isinstance(function, ast.Attribute) and function.attr in _READERS:
            return _ends_with(function.value, self._environments)
        return _ends_with(function, self._functions)


def _is_assignment(node: ast.AST) -> bool:
    return isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)


def _ends_with(node: ast.expr, names: set[str]) -> bool:
    return (isinstance(node, ast.Attribute) and node.attr in names) or (isinstance(node, ast.Name) and node.id in names)
