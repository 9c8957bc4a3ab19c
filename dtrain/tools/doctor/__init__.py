"""What a machine or an allocation has, what is wrong with it, and the remedy.

Each check is a small function that measures one thing and returns a `Finding`; none of them raises for what it finds.
`local` runs the checks of this machine; `nodes` those of several nodes of a SLURM cluster. Nothing here loads torch but
`collectives`, which runs in ranks of their own.
"""
