"""A run that goes on where it was: what is saved, when, and how it is found, compared and put back.

::

    state    everything that a run goes on from: taken from an engine, and put back
    kept     states of the loaders' parts, random streams on the net; what cannot be kept
    changed  which parameters learn and which the optimizers hold, where training changed that
    keeper   when it is saved
    finding  the last checkpoint that is good
    fitting  whether a checkpoint is this run's
"""
