"""Training: recipes, curriculum, trainers, runs that stop and resume."""
