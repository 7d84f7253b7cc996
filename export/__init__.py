"""From a trained checkpoint to a validated bundle: ONNX graphs, engines, parity gates."""
