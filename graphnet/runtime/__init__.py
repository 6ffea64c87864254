"""Running compiled graphs: storage that outlives a step, programs, the live optimizer."""
