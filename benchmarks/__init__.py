"""Side by side against peers: `python -m benchmarks.<row>`; every figure comes with its loss and gradient norm."""
