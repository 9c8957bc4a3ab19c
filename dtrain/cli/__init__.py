"""The command line: each verb a thin function over the library; heavy imports stay inside the verbs."""

from dtrain.cli.app import main

__all__ = ["main"]
