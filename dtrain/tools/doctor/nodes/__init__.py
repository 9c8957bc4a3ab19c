"""Several nodes of a SLURM cluster, looked at together.

`job` submits a job and waits for it; in it, or in an allocation that is there already, `host` starts one task a node
(`task`), which connects back to it and does what it asks for: a folder's tokens, ports, ranks. `verdict` turns
what came of that into findings and a table; it is pure. A node that cannot be reached, or does not see the folder,
is so found out by the others.
"""
