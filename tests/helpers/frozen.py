"""Imported last by the process that ranks are forked from.

What is there is kept out of garbage collection, which would touch each object, and so copy its memory, in each rank.
"""

import gc

gc.collect()
gc.freeze()
