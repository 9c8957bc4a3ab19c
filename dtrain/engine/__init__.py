"""The training loop: the train step, validation, prediction and exact metrics."""
