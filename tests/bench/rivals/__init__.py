"""One file for each rival, loaded by its name; see `bench.loading.Rival` for what it defines."""
