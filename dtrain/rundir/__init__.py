"""What a run leaves on disk, readable without torch: its history, columns, starts, lock and job."""
