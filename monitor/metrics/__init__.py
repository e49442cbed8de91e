"""One file per metric: what it is, its formula over recorded statistics, and cases with known answers."""
