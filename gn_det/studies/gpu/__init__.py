"""One report of everything that a GPU shows: the checks, and the figures of those that passed."""
