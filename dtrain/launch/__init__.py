"""Starts ranks and tells what they are: standard library only, so that ranks start at once."""
