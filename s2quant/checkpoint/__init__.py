"""Checkpoint folders: configuration, layout, strict reader, shard writer."""
