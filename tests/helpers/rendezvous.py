"""A word of a launcher, and any JSON, for tests of what launchers send."""

from __future__ import annotations

from dataclasses import asdict

from hypothesis import strategies as st

from dtrain.launch.monitor.postmortem import RankFailure
from dtrain.launch.nodes.messages import ExitMessage

FAILURE = RankFailure(
    1, 0, "h", "cpu", 1, 2, "train", "exception", {"type": "E", "message": "m"}, "trace", {"0": "ended"}
)
WORD = ExitMessage(1, 1, "it failed\n", 12.5, False, asdict(FAILURE), {"1": "failed"})
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)
