"""Classifiers of any norm: networks, data sets, object crops, and their training."""
