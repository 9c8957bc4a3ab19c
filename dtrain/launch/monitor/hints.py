"""What often lies behind an exception's words, in a line for whoever meets them for the first time."""

from __future__ import annotations

import re
from collections.abc import Callable

_Words = str | Callable[[re.Match[str]], str]

_DEVICE = (
    "dtrain puts the model and each batch on the device itself: remove .cuda() and .to(device), and the same code runs "
    "on CPU and GPU. For a new tensor in a step, take a batch's: torch.zeros(3, device=x.device)"
)
# Of each exception the first that matches. The messages are torch's and Python's.
_HINTS: list[tuple[str, _Words]] = [
    (r"Torch not compiled with CUDA|Found no NVIDIA driver|No CUDA GPUs are available", _DEVICE),
    (r"Expected all tensors to be on the same device|is on cpu, different from other tensors on cuda", _DEVICE),
    (
        r"attempted relative import with no known parent",
        "a recipe file is imported by itself, with its folder on sys.path: write `from nets import Net` without the "
        "dot; or name it as a module of its package: dtrain train package.recipe",
    ),
    (
        r"mat1 and mat2 shapes cannot be multiplied \((\d+)x(\d+) and (\d+)x(\d+)\)",
        lambda m: f"a Linear layer expects {m[3]} input features, but gets {m[2]} (in rows: {m[1]})",
    ),
    (
        r"mat1 and mat2 must have the same dtype, but got (Long|Int|Byte|Double)",
        lambda m: (
            f"the model gets {m[1]} and has Float weights: pass features.float(); or are features and labels swapped?"
        ),
    ),
    (
        r"expected target dtype to be Long|expected scalar type Long|not implemented for 'Int'",
        "cross_entropy takes class numbers as int64: pass labels.long()",
    ),
    (
        r"Target (-?\d+) is out of bounds",
        lambda m: (
            f"a label is {m[1]}, but the model has fewer outputs: classes are counted from 0, and the last layer "
            "needs as many outputs as there are classes"
        ),
    ),
    (
        r"must be Tensor, not (tuple|list|str)",
        lambda m: (
            f"the model gets a {m[1]} in place of a tensor. If the samples are texts, turn them into tensors in "
            "the Dataset, or in the DataLoader's collate_fn"
        ),
    ),
    (r"num_samples should be a positive integer value, but got num_samples=0", "the dataset is empty"),
    (
        r"does not require grad and does not have a grad_fn",
        "the loss has no graph: it was made under torch.no_grad(), or with .item() or .detach()",
    ),
    (
        r"backward through the graph a second time",
        "a tensor with a graph was kept from an earlier step: keep its .detach(), or .item()",
    ),
    (
        r"The size of tensor a \((\d+)\) must match the size of tensor b \((\d+)\)",
        lambda m: f"two shapes differ, {m[1]} and {m[2]}: of predictions and labels, perhaps?",
    ),
]
_COMPILED = [(re.compile(pattern), words) for pattern, words in _HINTS]


def hint_of(text: str) -> str:
    """Returns a line for what an exception's words often mean, with a line break before it; empty for none.

    Args:
        text: of the exception.
    """
    for pattern, words in _COMPILED:
        found = pattern.search(text)
        if found is not None:
            return f"\n  hint: {words if isinstance(words, str) else words(found)}"
    return ""
