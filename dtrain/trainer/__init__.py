"""A config and a recipe made into one rank's run in a folder."""
