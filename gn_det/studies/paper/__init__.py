"""The experiments of Wu & He 2018: sweeps, shifts, features, and their figures."""
