"""Which nodes can take part in an all-reduce: they came, run the same code, and reach one another."""

from __future__ import annotations

from collections import Counter

from dtrain.tools.doctor.nodes.cluster_report import ClusterReport


def fit_together(seen: ClusterReport) -> tuple[list[str], dict[str, str]]:
    """Returns the nodes that fit together, in SLURM's order; and why the others do not."""
    nodes = [node for node in seen.present if node not in seen.lost and node in seen.reach]
    out = {node: "it stopped answering" for node in seen.present if node not in nodes}
    for node, what in odd_versions(seen, nodes).items():
        out[node] = f"not the others' {' and '.join(what)}"
        nodes.remove(node)
    while nodes:
        cut = {node: sum(apart(seen, node, other) for other in nodes if other != node) for node in nodes}
        worst = max(reversed(nodes), key=lambda node: cut[node])  # of two that are apart, the first one stays
        if not cut[worst]:
            break
        others = [other for other in nodes if other != worst and apart(seen, worst, other)]
        out[worst] = f"it and {', '.join(others)} cannot reach each other"
        nodes.remove(worst)
    return nodes, out


def odd_versions(seen: ClusterReport, nodes: list[str]) -> dict[str, list[str]]:
    """Returns node -> names of what differs from most others (from the first node where there are as many)."""
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for node in nodes for name in seen.facts[node]["versions"]):
        usual = usual_version(seen, nodes, name)
        for node in nodes:
            if seen.facts[node]["versions"].get(name) != usual:
                found.setdefault(node, []).append(name)
    return found


def usual_version(seen: ClusterReport, nodes: list[str], name: str) -> str:
    """Returns the version that most nodes have."""
    found = Counter(str(seen.facts[node]["versions"].get(name, "missing")) for node in nodes)
    return found.most_common(1)[0][0]


def apart(seen: ClusterReport, first: str, second: str) -> bool:
    """Whether a node cannot reach another, or that one not it."""
    ways = (seen.reach.get(first, {}).get(second), seen.reach.get(second, {}).get(first))
    return any(way is None or not way["by"] for way in ways)
