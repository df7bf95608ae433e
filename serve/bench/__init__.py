"""Latency of exported models, several measured in turn in one process: see ``bench`` in serve.bench.runner."""
