"""One folder for each study: what its program in tools/ is made of. None imports another."""
