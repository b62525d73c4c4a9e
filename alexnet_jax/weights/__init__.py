"""Reads files of weights: of this project, PyTorch, ONNX and Caffe."""
