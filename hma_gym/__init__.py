"""hma_gym: robot manipulation in a learned simulator, side by side with MuJoCo, through Gymnasium."""

__version__ = "0.1.0"
