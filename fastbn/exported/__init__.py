"""Models of frameworks, folded by way of a graph that is made of them: plans come from the ONNX wing, the changes go into the model."""
