"""Which norm for which data: the rows that were measured, and the one that is near."""
