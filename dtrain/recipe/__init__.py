"""The user's file: imported, its builders found and checked against their signatures."""
