"""From a fused graph to steps on fixed memory: launches, generated code, plan, builds, targets."""
