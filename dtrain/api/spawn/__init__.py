"""A call in a notebook, run as ranks of this machine: all it takes goes there by value, what it changed comes back.

::

    this process                          ranks 0 .. N-1, started by dtrain.launch.supervisor
    call:    check what was asked
    parcel:  write the call          ->   rank: read the parcel, bring the world up, call the function
                                          rank 0: write the results
    results: put them into the       <-
             caller's own objects

The two files lie in a folder that only this user can read, for as long as the call takes.
"""
