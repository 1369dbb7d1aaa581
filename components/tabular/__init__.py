"""Components of the pipeline for tables."""
