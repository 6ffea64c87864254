"""Measured configurations: the tables that are shipped, the cache, and the search."""
