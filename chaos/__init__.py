"""Random faults against the real thing, and an audit of what they cost: it must be nothing."""
