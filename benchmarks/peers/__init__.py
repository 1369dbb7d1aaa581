"""Services as their documentation shows them, for `benchmarks.vision_serving` to compare with."""
