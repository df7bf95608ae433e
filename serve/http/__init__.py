"""The server in three parts that do not know each other: transport (app), batcher, and an engine (in a Classifier)."""
