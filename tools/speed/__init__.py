"""Parts of `tools/speed_check.py`."""
