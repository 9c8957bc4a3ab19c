"""Fully sharded data parallelism: each rank holds a part of the weights, their gradients and the optimizer's state.

By torch's `fully_shard` (FSDP2), on CPU ranks too, where Accelerate does not shard. See docs/sharding.md.
"""
