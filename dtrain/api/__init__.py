"""The styles in which dtrain is used from Python: a function, Keras' way, a script with its own loop, a notebook."""
