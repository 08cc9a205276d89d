"""`make bench`: what a question costs, measured beside the usual loop on the same samples."""
