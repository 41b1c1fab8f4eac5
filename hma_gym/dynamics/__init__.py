"""The learned dynamics: masking, decoding, rollout, checkpoints."""
