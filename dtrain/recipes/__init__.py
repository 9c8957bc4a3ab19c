"""Recipes that come with dtrain and run as they are."""
