"""One report of everything that a GPU shows: what was checked on it, and figures that stand."""
