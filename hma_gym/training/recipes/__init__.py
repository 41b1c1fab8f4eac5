"""Recipes: functions that return one full training configuration."""
