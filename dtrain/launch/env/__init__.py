"""What a machine and its schedulers say: ranks, cores, GPUs, memory, ports."""
