"""One rank's part of each batch, in an order that is the same on any number of ranks."""
