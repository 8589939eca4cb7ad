"""File formats: bytes to arrays and back, nothing else."""
