"""Entry point of ``python -m dtrain`` and of ``accelerate launch dtrain`` in a checkout.

The latter runs this folder as a script, which puts the folder itself first on
``sys.path``: our ``config.py`` or ``history.py`` would then shadow a user's module
of that name. It is taken off again before anything else is imported.
"""

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - pathlib is not imported yet
if not __package__:
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or ".") != _HERE]  # noqa: PTH100
    if os.path.dirname(_HERE) not in sys.path:  # noqa: PTH120
        sys.path.insert(0, os.path.dirname(_HERE))  # noqa: PTH120

from dtrain.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
