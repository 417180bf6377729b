"""What a run did: statistics, failures, the summary page and metrics."""
