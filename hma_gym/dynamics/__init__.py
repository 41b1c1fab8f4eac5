"""The action-video dynamics model: masking, token heads, the model, rollouts with a cache, checkpoints."""
