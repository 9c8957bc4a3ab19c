"""Where a recipe's time goes: `dtrain bench`."""
