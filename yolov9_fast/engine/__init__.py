"""Training, evaluation and prediction: everything that runs a network over data."""
