"""A run that goes on where it was: what is saved, when, and how it is found, compared and put back.

::

    state    everything that a run goes on from: taken from an engine, and put back
    keeper   when it is saved
    finding  the last checkpoint that is good
    fitting  whether a checkpoint is this run's
"""
