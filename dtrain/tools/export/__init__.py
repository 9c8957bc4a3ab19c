"""A trained net as a file that other programs run: safetensors, torch.export and ONNX, compared before it has its name."""
