"""One-step policies from scratch on MetaWorld's states, every objective with the same network, data and steps."""
