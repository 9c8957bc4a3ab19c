"""What was seen of several nodes, turned into findings that name them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dtrain.tools.doctor.finding import Finding, State, passed
from dtrain.tools.doctor.gpus import Gpus
from dtrain.tools.doctor.nodes.cluster_report import ClusterReport
from dtrain.tools.doctor.nodes.fitting import odd_versions, usual_version
from dtrain.tools.doctor.pairing import SLOW, best_pairs, slowest
from dtrain.tools.doctor.ranks import REDUCE, giga, judge_compute, judge_reduce, judge_torch
from dtrain.tools.doctor.words import many, rate, seconds

NODES, VERSIONS, CLOCKS = "nodes", "same versions", "clocks"
FOLDER, LOCKS, PORTS, GPUS = "shared folder", "shared locks", "names and ports", "same GPUs"
SLOWEST, PAIRS = "slowest node", "slowest network"
_SKEW_SECONDS = 1.0
_MOST_NAMED = 8


def judge(seen: ClusterReport, folder: str) -> list[Finding]:
    """Returns all findings.

    Args:
        seen: what was seen.
        folder: the one that all nodes should see, for people.
    """
    found = [_came(seen)]
    if not seen.facts:
        return found
    found += [_versions(seen), _gpus(seen), _clocks(seen), _folder(seen, folder), _locks(seen), _ports(seen)]
    return [*found, *merged(seen.machine), *_ranks(seen)]


def _came(seen: ClusterReport) -> Finding:
    words = f"{len(seen.facts)} of {many(len(seen.nodes), 'node')} started: {names(seen.present) or 'none'}"
    trouble = [f"{node} did not start: {why}" for node, why in seen.absent.items()]
    trouble += [f"{node} was lost during: {what}" for node, what in seen.lost.items()]
    if trouble:
        remedy = "check that node (scontrol show node NAME), or exclude it: --sbatch-arg=--exclude=NAME"
        return Finding(NODES, "fail", "; ".join([words, *_shortened(trouble)]), remedy)
    return passed(NODES, words)


def _versions(seen: ClusterReport) -> Finding:
    odd = odd_versions(seen, seen.present)
    usual = {name: usual_version(seen, seen.present, name) for name in seen.facts[seen.present[0]]["versions"]}
    if odd:
        told = []
        for node, what in odd.items():
            own = seen.facts[node]["versions"]
            told.append(f"{node} has {', '.join(f'{name} {own.get(name)}' for name in what)}")
        differ = dict.fromkeys(name for what in odd.values() for name in what)
        words = f"{'; '.join(_shortened(told))}; the others: {', '.join(f'{name} {usual[name]}' for name in differ)}"
        return Finding(
            VERSIONS, "fail", words, "use one environment on all nodes, such as one on the shared file system"
        )
    return passed(VERSIONS, ", ".join(f"{name} {version}" for name, version in usual.items()))


def _gpus(seen: ClusterReport) -> Finding:
    kinds: dict[str, list[str]] = {}
    for node in seen.present:
        kinds.setdefault(str(seen.facts[node]["models"]) or "none", []).append(node)
    if len(kinds) > 1:
        words = "; ".join(f"{kind} on {names(nodes)}" for kind, nodes in kinds.items())
        return Finding(
            GPUS, "warn", words, "request nodes of one kind: --sbatch-arg=--constraint=..., or --gpus-per-node"
        )
    return Finding(GPUS, "skip" if "none" in kinds else "pass", f"{next(iter(kinds))} on each node")


def _clocks(seen: ClusterReport) -> Finding:
    ahead = {node: offset for node, (offset, exact) in seen.skew.items() if abs(offset) - exact > _SKEW_SECONDS}
    if ahead:
        words = ", ".join(f"{node} is {offset:+.1f} s" for node, offset in ahead.items())
        remedy = "synchronize the clocks with NTP (chronyc tracking): W&B and the ownership of runs depend on them"
        return Finding(CLOCKS, "warn", f"{words} from {next(iter(seen.skew))}", remedy)
    most = max((abs(offset) + exact for offset, exact in seen.skew.values()), default=0.0)
    return passed(CLOCKS, f"within {seconds(most)} of each other, within the measurement error")


def _folder(seen: ClusterReport, folder: str) -> Finding:
    blind = _blind(seen)
    bad = [f"{node} does not see files that others write there" for node in blind]
    for node, one in seen.files.items():
        if one["error"]:
            bad.append(f"{node} cannot write there: {one['error']}")
    for node, read in seen.read.items():
        unseen = [other for other, after in read.items() if after is None and other not in (*blind, ".host")]
        if node not in blind and unseen:
            bad.append(f"{node} does not see the files of {names(unseen)}")
    if bad:
        remedy = "use a file system that all nodes mount: run.dir=FOLDER; check `mount` on that node"
        return Finding(FOLDER, "fail", f"{folder}: {'; '.join(_shortened(bad))}", remedy)
    speeds = {node: one["speed"] for node, one in seen.files.items()}
    late = max((after for read in seen.read.values() for after in read.values() if after is not None), default=0.0)
    slow = min(speeds, key=lambda node: speeds[node])
    words = f"every node saw every other node's file within {seconds(late)}"
    words = f"{words}; all writing at once, {slow} is the slowest with {rate(speeds[slow])}"
    return passed(FOLDER, words)


def _blind(seen: ClusterReport) -> list[str]:
    """Returns the nodes that do not see the folder as the host does."""
    return [node for node, read in seen.read.items() if read.get(".host") is None]


def _locks(seen: ClusterReport) -> Finding:
    bad = {node: state for node, state in seen.locks.items() if state != "held" and node not in _blind(seen)}
    if bad:
        words = ", ".join(
            f"{node} {'got a lock that another machine holds' if state == 'taken' else f'has {state}'}"
            for node, state in bad.items()
        )
        remedy = "dtrain then uses heartbeats, which takes up to 30 s; mount with locks (Lustre: -o flock)"
        return Finding(LOCKS, "warn", words, remedy)
    return passed(LOCKS, f"a lock of one node excludes the others ({many(len(seen.locks), 'node')})")


def _ports(seen: ClusterReport) -> Finding:
    if len(seen.present) < 2:
        return Finding(PORTS, "skip", "there is only one node")
    ways = {(node, peer): way for node, found in seen.reach.items() for peer, way in found.items()}
    cut = [f"{node} cannot reach {peer} ({way['error']})" for (node, peer), way in ways.items() if not way["by"]]
    nameless = [(peer, way["error"]) for (_, peer), way in ways.items() if way["by"] == "address"]
    nameless += [(node, facts["trouble"]) for node, facts in seen.facts.items() if facts["trouble"]]
    if cut:
        remedy = "allow all nodes of a job to reach each other on any port (firewall, routes, one network)"
        return Finding(PORTS, "fail", "; ".join(_shortened(cut)), remedy)
    if nameless:
        told = [f"{peer}: {error}" for peer, error in dict(nameless).items()]
        remedy = "make the names of all nodes resolve on all nodes: DNS, or /etc/hosts"
        return Finding(PORTS, "warn", f"reached by address only: {'; '.join(_shortened(told))}", remedy)
    slow = max((way["seconds"] for way in ways.values()), default=0.0)
    return passed(PORTS, f"each node reached every other, both ways, in {seconds(slow)} at most")


def merged(machine: Mapping[str, Iterable[Mapping[str, str]]]) -> list[Finding]:
    """Returns each node's own findings as one list: what is not well for each node, what is well once.

    Args:
        machine: node -> its findings.
    """
    by_name: dict[str, dict[str, Finding]] = {}
    for node, findings in machine.items():
        for one in findings:
            by_name.setdefault(one["name"], {})[node] = Finding(**one)  # type: ignore[arg-type]
    return [found for name, one in by_name.items() for found in _merge(name, one)]


def _merge(name: str, found: Mapping[str, Finding]) -> list[Finding]:
    groups: dict[tuple[State, str], list[str]] = {}
    for node, one in found.items():
        if one.state in ("warn", "fail"):
            groups.setdefault((one.state, one.remedy), []).append(node)
    if groups:
        return [
            Finding(name, state, f"{who[0]}: {found[who[0]].measured}{_likewise(who[1:])}", remedy)
            for (state, remedy), who in groups.items()
        ]
    first, *others = found
    words = f"{first}: {found[first].measured}{_likewise(others)}"
    return [Finding(name, found[first].state, words)]


def _likewise(nodes: list[str]) -> str:
    return f"; {names(nodes)} likewise" if nodes else ""


def _ranks(seen: ClusterReport) -> list[Finding]:
    left_out = [f"{node} did not take part: {why}" for node, why in seen.left_out.items()]
    if seen.measured is None:
        remedy = "fix the problems above first; then try a short training run"
        why = " ".join(seen.trouble.split())[:400]
        state: State = "skip" if len(seen.nodes) == 1 else "fail"
        return [Finding(REDUCE, state, "; ".join([f"not measured: {why}", *_shortened(left_out)]), remedy)]
    ranks, joined = seen.measured["ranks"], names(seen.joined)
    visible = Gpus(visible=min(seen.facts[node]["visible"] for node in seen.joined))
    found = [judge_torch(seen.measured["torch"], visible, cpu=ranks[0][2] == "cpu")]
    for one in seen.measured["reduces"]:
        reduce = judge_reduce(one, len(ranks))
        words = "; ".join([f"{reduce.measured}, on {joined}", *_shortened(left_out)])
        state = "warn" if reduce.state == "pass" and left_out else reduce.state
        remedy = reduce.remedy or ("fix the problem named above for that node" if left_out else "")
        found.append(Finding(REDUCE, state, words, remedy))
    return [*found, judge_compute(ranks), *_slowest(seen)]


def _slowest(seen: ClusterReport) -> list[Finding]:
    """Names the node whose ranks compute slowest, and the one whose network is; see `pairing`."""
    assert seen.measured is not None  # noqa: S101 - for the type checker
    speeds: dict[int, float] = {}
    for node, _, _, speed, _ in seen.measured["ranks"]:
        speeds[node] = min(speed, speeds.get(node, speed))
    found = []
    if (slow := slowest(speeds)) is not None:
        words = f"{seen.joined[slow[0]]}: {giga(speeds[slow[0]])} GFLOP/s per rank, {slow[1]:.0%} of the others' median"
        remedy = (
            "check what else runs there (top, nvidia-smi), and for thermal or power throttling; all ranks wait for it"
        )
        found.append(_slow_or_not(SLOWEST, words, slow[1], remedy))
    pairs = best_pairs(seen.measured["pairs"])
    if len(pairs) == 2:
        return [
            *found,
            Finding(PAIRS, "skip", "with two nodes the slow one cannot be identified: use --nodes 3 or more"),
        ]
    if (slow := slowest(pairs)) is not None:
        words = (
            f"{seen.joined[slow[0]]}: {rate(pairs[slow[0]])} with its best partner, {slow[1]:.0%} of the others' median"
        )
        remedy = "check its link (ethtool, ibstat) and cable, or exclude it: --sbatch-arg=--exclude=NAME"
        found.append(_slow_or_not(PAIRS, words, slow[1], remedy))
    return found


def _slow_or_not(name: str, words: str, share: float, remedy: str) -> Finding:
    return Finding(name, "warn", words, remedy) if share < SLOW else passed(name, words)


def names(nodes: Iterable[str]) -> str:
    """Returns "n1, n2", and how many more."""
    known = list(nodes)
    return ", ".join(known[:_MOST_NAMED]) + (
        f" and {len(known) - _MOST_NAMED} more" if len(known) > _MOST_NAMED else ""
    )


def _shortened(parts: list[str]) -> list[str]:
    return parts[:_MOST_NAMED] + ([f"{len(parts) - _MOST_NAMED} more"] if len(parts) > _MOST_NAMED else [])


def table(seen: ClusterReport) -> list[list[str]]:
    """Returns a row for each node, after one of titles."""
    rows = [["node", "came", "cores", "GPUs", "torch", "folder", "writes", "reaches", "clock", "GFLOP/s", "network"]]
    measured = seen.measured or {"ranks": [], "pairs": []}
    pairs = best_pairs(measured["pairs"])
    for node in seen.nodes:
        if node not in seen.facts:
            rows.append([node, "no", *["-"] * 9])
            continue
        place = seen.joined.index(node) if node in seen.joined else -1
        compute = [speed for number, _, _, speed, _ in measured["ranks"] if number == place]
        rows.append(
            [
                node,
                "lost" if node in seen.lost else "yes",
                str(seen.facts[node]["cores"]),
                str(seen.facts[node]["visible"]),
                str(seen.facts[node]["versions"].get("torch", "missing")),
                _cell_of_folder(seen, node),
                rate(seen.files[node]["speed"]) if seen.files.get(node, {}).get("speed") else "-",
                _cell_of_reach(seen, node),
                f"{seen.skew[node][0]:+.3f} s" if node in seen.skew else "-",
                giga(min(compute)) if compute else "-",
                rate(pairs[place]) if place in pairs else "-",
            ]
        )
    return rows


def _cell_of_folder(seen: ClusterReport, node: str) -> str:
    if node in _blind(seen):
        return "blind"
    if seen.files.get(node, {"error": "?"})["error"]:
        return "no write"
    read = seen.read.get(node, {})
    return "yes" if read and None not in read.values() else "in part"


def _cell_of_reach(seen: ClusterReport, node: str) -> str:
    found = seen.reach.get(node, {})
    return f"{sum(bool(way['by']) for way in found.values())} of {len(seen.present) - 1}"
