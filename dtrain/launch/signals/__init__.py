"""Requests to stop, escalation, and the ends of processes."""
