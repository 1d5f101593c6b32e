"""Figures: curves, objects drawn over images, contact sheets."""
