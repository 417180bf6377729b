"""Writing parts, and the claims that let any number of processes write one cache."""
