"""Quantization of tensors: grids, statistics, thresholds, quantizers."""
