"""What a model does on samples, tensor by tensor, for merge methods to read."""
