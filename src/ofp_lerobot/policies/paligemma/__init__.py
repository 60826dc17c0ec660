"""What π₀'s `ofp_pi0` and π₀.₅'s `ofp` share: PaliGemma for the prefix, a Gemma for the actions."""
