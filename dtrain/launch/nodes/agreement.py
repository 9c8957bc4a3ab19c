"""What must be the same on all nodes: compared between launchers without showing one node's command line to another.

What travels is a digest by the job's key; counts and hashes of files travel as they are, and where the nodes have a
secret, everything but the command.
"""

from __future__ import annotations

from collections.abc import Mapping

from dtrain.launch.nodes.secret import Secret, derive

PLACE, COMMAND = "--rdzv and --job-id", "the command"
NODES, NODE_RANK, RANKS = "--nodes", "--node-rank", "-n"
CONTENT = "the content of "
_OPEN = (NODES, NODE_RANK, RANKS)
_DIGEST = "digest:"
_LONGEST = 200
_ANOTHER = "another one"


def as_sent(about: Mapping[str, str], secret: Secret) -> dict[str, str]:
    """Returns what a launcher sends of what must be the same."""
    key = secret.key("about")
    return {
        name: value if _is_open(name, value, secret) else _digest(key, name, value) for name, value in about.items()
    }


def first_difference(mine: Mapping[str, str], theirs: Mapping[str, str]) -> str | None:
    """Returns the first name whose values differ, of what two launchers send; None where nothing does."""
    return next((name for name, value in mine.items() if theirs.get(name) != value), None)


def shown(sent: str | None) -> str:
    """Returns what a person is shown of another node's value."""
    if sent is None:
        return "nothing"
    return _ANOTHER if sent.startswith(_DIGEST) else sent


def difference_text(name: str, first: str, other: str, node: int) -> str:
    """Returns what a person should read of a value that differs.

    Args:
        name: what differs.
        first: the value on node 0.
        other: that on another node.
        node: which one.
    """
    return (
        f"{name} is not the same on all nodes: {first} on node 0, {other} on node {node}. "
        "Run the same command with the same files on every node; a second job needs another port or --job-id."
    )


def _is_open(name: str, value: str, secret: Secret) -> bool:
    if len(value) > _LONGEST or value.startswith(_DIGEST):
        return False
    return name in _OPEN or name.startswith(CONTENT) or (bool(secret) and name != COMMAND)


def _digest(key: bytes, name: str, value: str) -> str:
    return _DIGEST + derive(key, name, value).hex()[:32]
