"""Models of tables: candidates, their search, and their export to ONNX."""
