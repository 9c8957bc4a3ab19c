"""Files that `dtrain init` copies; see `dtrain.scaffold`."""
