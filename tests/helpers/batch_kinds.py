"""Batches that are no stacked tensors, in the way of well-known libraries."""

from __future__ import annotations

import collections
import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Encoding(collections.UserDict):
    """As transformers' BatchEncoding: a UserDict with the tokenizer's own view of each sample beside the data."""

    def __init__(self, data: Any = None, encodings: Any = None, n_sequences: int = 1) -> None:
        super().__init__(data)
        self._encodings = encodings
        self._n_sequences = n_sequences

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None


class Graph:
    """One graph: features of its nodes, and edges between them."""

    def __init__(self, x: Tensor, edges: Tensor) -> None:
        self.x, self.edges = x, edges


class Graphs:
    """As PyTorch Geometric's Batch: the nodes of all graphs in one tensor."""

    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)

    @property
    def num_graphs(self) -> int:
        return len(self.ptr) - 1

    def keys(self) -> list[str]:
        return list(self.__dict__)

    def to_data_list(self) -> list[Graph]:
        bounds = self.ptr.tolist()
        return [
            Graph(self.x[start:stop], self.edges[:, self.of_edge == n] - start)
            for n, (start, stop) in enumerate(itertools.pairwise(bounds))
        ]

    @classmethod
    def from_data_list(cls, graphs: list[Graph]) -> Graphs:
        starts = np.cumsum([0] + [len(graph.x) for graph in graphs]).tolist()
        of_edge = [torch.full((graph.edges.shape[1],), n) for n, graph in enumerate(graphs)]
        return cls(
            x=torch.cat([graph.x for graph in graphs]),
            edges=torch.cat([graph.edges + start for graph, start in zip(graphs, starts, strict=False)], 1),
            of_edge=torch.cat(of_edge),
            ptr=torch.tensor(starts),
        )
