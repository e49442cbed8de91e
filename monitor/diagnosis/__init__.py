"""From recorded series to a verdict: fold engine, episodes, findings, incidents."""
