"""What an artifact is turned into for other servers: plans for TensorRT, model folders for Triton Inference Server."""
