"""Which code a run trains with: the user's own sources as Python loaded them, kept with the run and compared.

::

    loading    records the bytes that are compiled when a module of the user's own is imported
    code       the sources that belong to one recipe
    opened     the files that code opens or executes besides
    kept       their copies in the run's folder
    trees      two versions of a file: whether they differ, and where first
    variables  the environment variables that sources read by name
"""
