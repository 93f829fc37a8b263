"""Export of models to ONNX, OpenVINO and torch.export, with all that a runtime without torch needs."""
