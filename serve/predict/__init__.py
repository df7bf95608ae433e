"""What speed-up to expect before any training, from the model's own layers on this machine: see serve.predict.run."""
