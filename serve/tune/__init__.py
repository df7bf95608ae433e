"""``bench --tune``: the fastest of several artifacts of one model in several engines, never one slower than dense."""
