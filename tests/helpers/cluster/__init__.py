"""A real SLURM of virtual nodes on this machine, for the tests: slurmctld, munge and a slurmd a node.

`needs` says whether it can be had here, `settings` writes SLURM's files, `machine` is the first process of a virtual
machine, `machines` boots them and turns them off, `services` starts SLURM on them, `cluster` is what tests use.
"""

from helpers.cluster.cluster import Cluster, cluster
from helpers.cluster.jobs import Job
from helpers.cluster.needs import missing, need
from helpers.cluster.settings import Plan

__all__ = ["Cluster", "Job", "Plan", "cluster", "missing", "need"]
