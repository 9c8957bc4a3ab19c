"""Limits that this process has from its shell or its site: open files, as many as a launcher of many nodes needs."""

from __future__ import annotations

from dtrain.errors import WorldError

try:
    import resource
except ImportError:  # Windows, which has no such limit
    resource = None  # type: ignore[assignment]


def allow_open_files(needed: int, what: str) -> None:
    """Raises this process's soft limit of open files where it is lower than what is needed.

    Args:
        needed: the number of open files.
        what: needs them, such as "--nodes 1000", for the message.

    Raises:
        WorldError: the hard limit is lower.
    """
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise WorldError(
            f"{what} needs {needed} open files on the first node, where this process may have {hard} at most "
            "(ulimit -Hn). Raise the limit there: LimitNOFILE= of its service, or /etc/security/limits.conf."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
