"""GN beside frozen BN and BN: a matrix of runs, their cost, the report."""
