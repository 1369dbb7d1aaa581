"""Components that lead from the data to a judged model."""
