"""What is done to the user's net and optimizer: DDP, FSDP, precision, compiling, SyncBatchNorm, averages, clipping."""
