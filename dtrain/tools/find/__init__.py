"""Searches for a value that a recipe trains well with: the learning rate, and the largest batch that fits.

Nothing of the user's is changed: no run's folder is made, and what was trained on goes with its process.
"""
