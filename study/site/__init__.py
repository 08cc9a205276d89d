"""The study as a static site: `python -m study.site` (or `make site`)."""
