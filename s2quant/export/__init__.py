"""Writing checkpoint folders: random ones, quantized ones, export profiles; and checking what was written."""
