"""From BN to GN: detectors and classifiers, stage by stage, with a report."""
