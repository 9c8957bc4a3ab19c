"""Entry point of ``python -m dtrain`` and of ``accelerate launch dtrain`` in a checkout.

The latter runs this folder as a script, which puts the folder itself first on
``sys.path``: our ``config.py`` or ``history.py`` would then shadow a user's module
of that name. It is taken off again before anything else is imported.

``python -m`` puts the present folder there, where a user's ``random.py`` would shadow
Python's own: it goes, too, or behind all others where dtrain itself lies in it.
"""

import os
import sys

_safe_path = getattr(sys.flags, "safe_path", False)  # python -P, which has put nothing there
_HERE = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - pathlib is not imported yet
if not __package__:
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or ".") != _HERE]  # noqa: PTH100
    if os.path.dirname(_HERE) not in sys.path:  # noqa: PTH120
        sys.path.insert(0, os.path.dirname(_HERE))  # noqa: PTH120
elif sys.path and os.path.abspath(sys.path[0] or ".") == os.getcwd() and not _safe_path:  # noqa: PTH100, PTH109
    del sys.path[0]
    if not any(os.path.abspath(p or ".") == os.path.dirname(_HERE) for p in sys.path):  # noqa: PTH100, PTH120
        sys.path.append(os.path.dirname(_HERE))  # noqa: PTH120

from dtrain.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
