"""Training of heads (`common.engine.heads`) for a model, on what the model itself answers: `pdserve train-heads`."""
