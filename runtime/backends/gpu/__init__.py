"""What the backends on NVIDIA GPUs share."""
