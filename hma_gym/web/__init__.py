"""The web app: people label videos, drive the learned robot, and browse reports. Begin at :mod:`hma_gym.web.serve`."""
