"""Quantization: the plan, GPTQ and round-to-nearest, the loop over blocks."""
