"""Looking at runs: their histories in tables, pictures and a page, from what their folders hold. Without torch."""
