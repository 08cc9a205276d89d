"""Frames in; tables and figures out."""
