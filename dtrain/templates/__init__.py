"""Files that `dtrain init` copies; see `dtrain.cli.scaffold`."""
