"""From an equation of the fused graph to launches: one file for each kernel family."""
