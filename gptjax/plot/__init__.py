"""Pictures: the curves of runs, and figures for notebooks."""
