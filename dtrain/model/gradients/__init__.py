"""Gradients averaged over the ranks, and known to have been."""
