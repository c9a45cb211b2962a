"""Calibration: text lines -> prompts -> speech codes -> padded batches."""
