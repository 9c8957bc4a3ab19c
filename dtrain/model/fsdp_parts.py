"""Which parts of a net are gathered each by itself."""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatchcase

from torch import nn

from dtrain.distributed.fsdp_settings import Sharding
from dtrain.errors import UsageError, nearest


def parts_of(net: nn.Module, sharding: Sharding) -> list[nn.Module]:
    """Returns the modules that are sharded each by itself, inner ones first; the net itself is not among them.

    Raises:
        UsageError: a name or pattern matches none.
    """
    inner = {name: module for name, module in net.named_modules() if name and _can_be(module)}
    if sharding.least is not None:
        chosen = [m for m in inner.values() if sum(p.numel() for p in m.parameters()) > sharding.least]
    elif sharding.modules is None:
        named = tuple(getattr(net, "_no_split_modules", None) or ())  # what transformers' nets say of themselves
        chosen = [m for m in inner.values() if type(m).__name__ in named] or _repeated(net)
    else:
        chosen = _named(inner, sharding.modules)
    return chosen[::-1]  # named_modules() has outer ones first


def check_parts(net: nn.Module, sharding: Sharding | None) -> None:
    """Checks the names of parts before anything else is set up, also where one rank alone shards nothing.

    Raises:
        UsageError: a name or pattern matches none; every rank raises it, since their nets are alike.
    """
    try:
        if sharding is not None:
            parts_of(net, sharding)
    except UsageError as error:
        error.on_all_ranks = True
        raise


def _can_be(module: nn.Module) -> bool:
    """Whether a module is one that is called and has parameters."""
    container = isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict))
    return not container and any(True for _ in module.parameters())


def _repeated(net: nn.Module) -> list[nn.Module]:
    """Returns the blocks: the composed modules of which a list or sequence of the net has several of a class."""
    found: list[nn.Module] = []
    for holder in net.modules():
        if isinstance(holder, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            items = [item for item in holder.children() if _can_be(item) and any(True for _ in item.children())]
            kinds = Counter(type(item) for item in items)
            found += [item for item in items if kinds[type(item)] > 1 and not any(item is one for one in found)]
    return found


def _named(inner: dict[str, nn.Module], wanted: tuple[str, ...]) -> list[nn.Module]:
    found: dict[int, nn.Module] = {}
    for pattern in wanted:
        matching = [m for name, m in inner.items() if type(m).__name__ == pattern or fnmatchcase(name, pattern)]
        if not matching:
            classes = sorted({type(module).__name__ for module in inner.values()})
            raise UsageError(
                f"train.shard_modules (or fsdp_transformer_layer_cls_to_wrap): {pattern!r} is neither the class nor "
                f"the name of a module of the net.{nearest(pattern, [*classes, *inner])} Its classes are "
                f"{', '.join(classes)}; its names "
                f"{', '.join(list(inner)[:8])}{', ...' * (len(inner) > 8)}."
            )
        found |= {id(module): module for module in matching}
    return [module for module in inner.values() if id(module) in found]
