"""s2-mini: train a small S2 checkpoint that speaks, and a recognizer that understands it, from nothing."""
