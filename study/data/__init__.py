"""Benchmarks, models and how replies are judged."""
