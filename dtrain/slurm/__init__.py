"""SLURM: its commands, jobs that are submitted to it, and what becomes of them (standard library only)."""
