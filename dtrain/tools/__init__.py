"""Programs that use the trainer: find, check, bench and doctor."""
