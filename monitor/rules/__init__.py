"""One file per rule; see `monitor.rule` for what a rule is."""
