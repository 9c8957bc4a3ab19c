"""What listens to the engine: early stopping, norms, the profiler, progress views and trackers."""
