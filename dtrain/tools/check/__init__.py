"""Proofs on the user's own recipe."""
