"""What other trainers report on two ranks (numbers.py), and what an epoch costs with them (speed.py)."""
