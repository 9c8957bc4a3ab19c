"""A trained net as a file for other programs (safetensors, torch.export, ONNX), compared before it gets its name."""
