"""PyTorch's files: TorchScript, exported programs, checkpoints."""
