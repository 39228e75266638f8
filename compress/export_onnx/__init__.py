"""ONNX out: a graph whose weights are names becomes one that reads the output's own files."""
