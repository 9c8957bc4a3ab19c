"""Checkpoints on disk, in formats that cannot run code; see `dtrain.checkpoint.folder` for what a kill leaves.

::

    tree      any nested state <-> JSON and tensors
    streams   random generators <-> plain values
    tensors   tensors as safetensors, in pieces
    extra     modules' extra states in a file of weights
    folder    one checkpoint: written whole, sealed, verified; older ones pruned
    writer    beside the training, or in its way
    weights   a net's weights alone
    left_out  those that are not trained, and so not saved
    chosen    the best, the last or a named checkpoint of a run
    restored  a net as one has it
    outside   weights from elsewhere, and
    fitted    put into a net by name
"""

from dtrain.checkpoint.weights import load_weights, save_epoch, weights_of

__all__ = ["load_weights", "save_epoch", "weights_of"]
