"""How ranks are and how they ended: heartbeats, hangs, stacks, exit reports and the cause of a failure."""
