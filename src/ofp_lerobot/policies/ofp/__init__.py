"""The `ofp` policy: π₀.₅ with a one-step action head."""
