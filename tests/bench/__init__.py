"""What other trainers report on two ranks (means.py), and what an epoch costs with them (speed.py)."""
