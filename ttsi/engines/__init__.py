"""Engines: what scores, generates and embeds. `base` holds the protocol, `torch` the reference."""
