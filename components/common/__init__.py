"""Components that every pipeline ends with."""
