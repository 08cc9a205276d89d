"""The study of TT-SI: data, runs, analysis and notebooks around the method in `ttsi`."""
