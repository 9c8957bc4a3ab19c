"""torch._dynamo is not imported for training, and works as ever when something asks for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import Dtrain, clean_environment
from helpers.sweep import some

BEGIN = """
import sys, torch
from torch import nn

class Net(nn.Linear):
    def forward(self, x):
        return super().forward(x).exp()

def loaded():
    return "torch._dynamo.eval_frame" in sys.modules

if {defer}:
    from dtrain.distributed.lazy_dynamo import defer_dynamo
    defer_dynamo()
net = Net(3, 1)
optimizer = torch.optim.Adam(net.parameters(), lr=0.1)

def step():
    optimizer.zero_grad()
    net(torch.ones(2, 3)).sum().backward()
    optimizer.step()

step()
assert loaded() == (not {defer})
early = sys.modules["torch._dynamo"]
compiled = []

def backend(module, inputs):
    compiled.append(module.code)
    return module.forward
"""
# Each is the first that asks for it.
USES = {
    "compile": "net.compile(backend=backend); step(); step(); assert len(compiled) == 1, compiled",
    "a part": """
import torch._dynamo.config as config
assert config is torch._dynamo.config is sys.modules["torch._dynamo.config"]
""",
    "names": """
from torch._dynamo import optimize, explain
from torch import _dynamo
assert _dynamo.optimize is optimize
""",
    "an attribute": """
torch._dynamo.mine = 1
import torch._dynamo as again
assert again.mine == 1
import torch.onnx
""",
    "disabled by the user": """
@torch.compiler.disable
def hidden(x):
    return x.sin()
torch.compile(lambda x: hidden(x.cos()).tan(), backend=backend)(torch.ones(2))
assert not any("sin" in code for code in compiled) and any("tan" in code for code in compiled), compiled
""",
    "an old reference": """
early.reset()
def broken(x):
    y = x.sin()
    early.graph_break()
    return y.cos()
torch.compile(broken, backend=backend)(torch.ones(2))
assert len(compiled) == 2, compiled
""",
}
END = """
assert loaded()
assert torch._dynamo is sys.modules["torch._dynamo"]
for name, module in list(sys.modules.items()):
    if name.startswith("torch._dynamo"):
        assert module.__spec__.name == name and "SourceFileLoader" in str(module.__spec__.loader), name
# What torch keeps from being compiled, the real module knows.
step()
own = torch.optim.Optimizer.add_param_group.__wrapped__
torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)
assert own.__dict__["__dynamo_disable"] is not own
"""


def passes(code: str) -> None:
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, env=clean_environment(), timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("use", some(["compile", "an old reference"], [*USES][1:-1]))
def test_what_asks_for_it_gets_the_real_one(use: str) -> None:
    passes((BEGIN + USES[use] + END).replace("{defer}", "True"))


def test_these_uses_are_torchs_own() -> None:
    counted = "".join(f"\ncompiled.clear(); torch._dynamo.reset()\n{use}" for use in USES.values())
    passes((BEGIN + counted + END).replace("{defer}", "False"))


# sympy, too, comes with what torch.compile needs alone.
LOOK = """
import atexit, os, sys
from pathlib import Path

def look():
    found = [name for name in ("torch._dynamo.eval_frame", "sympy") if name in sys.modules]
    Path(__file__).with_name(f"loaded-{os.getpid()}").write_text(" ".join(found))

atexit.register(look)
"""


@pytest.mark.parametrize(
    ("words", "processes"),
    [
        *some([(["train", "-n", "2", "--cpu"], 2)], [(["train", "--cpu"], 1)]),
        (["train", "--dry-run"], 1),
        (["summary"], 1),
        (["check", "parity", "-n", "2"], 3),
    ],
)
def test_what_only_trains_or_looks_at_a_recipe_never_needs_it(
    dtrain: Dtrain, recipes: Path, words: list[str], processes: int
) -> None:
    (dtrain.folder / "looks.py").write_text((recipes / "small.py").read_text() + LOOK)
    verb = 2 if words[0] == "check" else 1
    done = dtrain(*words[:verb], "looks.py", *words[verb:])
    loaded = [path.read_text() for path in dtrain.folder.glob("loaded-*")]
    assert loaded == [""] * processes, done.text
