"""Reads files of weights: of this project, PyTorch and Caffe."""
