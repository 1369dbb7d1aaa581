"""Components that every family's pipeline ends with."""
