"""Measure what is on disk: recognizers, speaker similarity, failures, token metrics, speed, statistics, the run.

Nothing here sees the quantizer. Every number names the back end, the normalizer and the version that made it.
"""
