"""The server in parts that do not know each other: transport (app), a worker (batcher or scheduler), and a model."""
