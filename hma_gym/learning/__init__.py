"""Learning by doing: reinforcement learning in the learned world. It needs Gymnasium and the extra ``rl``."""
